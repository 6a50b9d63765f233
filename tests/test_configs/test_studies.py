"""The studies here: their configs, their committed reports, and what they recommend."""

import json
from pathlib import Path

import pytest
from mmengine.config import Config

from mmexpand.study import load_study, write_report
from mmexpand.surgery.checkpoint import META_KEY, load_checkpoint
from tests.test_configs.test_transfer import UNET, YOLO, data, load, train

__all__ = ['data']  # a fixture

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / 'configs/study').glob('*.py'))
REPORTED = [path for path in STUDIES if (ROOT / 'resources/studies' / path.stem).is_dir()]
REPVGG, BN = (
    YOLO / f'yolo-lite_expand-{block}_1xb8-2000iters_bccd-160x160.py' for block in ('repvgg', 'bn')
)
RECOMMENDED = [
    ('bccd_yolo-lite', 'bn', BN),
    ('bccd_yolo-lite', 'repvgg_folded', REPVGG),
    (
        'bccd_yolox-nano',
        'repvgg_folded',
        ROOT / 'configs/yolox/yolox-nano_expand-repvgg_1xb8-2000iters_bccd-160x160.py',
    ),
    (
        'camvid_fastscnn',
        'repvgg_folded',
        ROOT / 'configs/fastscnn/fast_scnn_expand-repvgg_1xb8-1500iters_camvid-96x128.py',
    ),
    (
        'camvid_unet',
        'repvgg_folded',
        UNET / 'unet-s4-d8_expand-repvgg_fcn_1xb8-1500iters_camvid-96x128.py',
    ),
]


@pytest.mark.parametrize('path', STUDIES, ids=lambda path: path.stem)
def test_a_study_can_be_read(path):
    study = load_study(path)
    assert study.arm(study.baseline).config
    assert 'compact' in study.baseline or study.baseline == 'bn'


@pytest.mark.parametrize('path', REPORTED, ids=lambda path: path.stem)
def test_the_committed_table_is_of_the_committed_results(path, tmp_path):
    """The text beside the table depends on the data on the machine."""
    committed = ROOT / 'resources/studies' / path.stem / 'study.md'
    assert rows(committed.read_text()) == rows(write_report(load_study(path), tmp_path))


def rows(text):
    return [line for line in text.splitlines() if line.startswith('|')]


@pytest.mark.parametrize(('name', 'arm', 'path'), RECOMMENDED)
def test_a_config_has_the_best_learning_rate_of_its_study(name, arm, path):
    """The compact network's too: at BCCD's former one it did not train."""
    found = json.loads((ROOT / f'resources/studies/{name}/study.json').read_text())['arms']
    compact = load_study(ROOT / f'configs/study/{name}.py').arm('compact').config
    for config, best in ((path, found[arm]), (compact, found['compact'])):
        assert Config.fromfile(config).optim_wrapper.optimizer.lr == best['lr']


@pytest.mark.parametrize(('name', 'arm', 'path'), RECOMMENDED)
def test_what_is_recommended_is_what_was_studied(name, arm, path, data, tmp_path):
    arm = load_study(ROOT / f'configs/study/{name}.py').arm(arm)
    *hooks, contract = Config.fromfile(path).custom_hooks
    assert [dict(hook) for hook in hooks] == arm.cfg_options['custom_hooks']
    assert contract == dict(type='ContractHook')
    train(load(path, data, tmp_path))
    layers = load_checkpoint(tmp_path / 'compact_last.pth')['meta'][META_KEY]['layers']
    assert len(layers) >= 5
