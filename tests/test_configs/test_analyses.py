"""The configs and studies of Tables 7 and 9: what they build, and a short training."""

import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from mmexpand.mm.launch import build_runner
from mmexpand.mm.models import build_compact_model, build_expanded_model
from mmexpand.study import Run, load_study
from mmexpand.study.run import run_config
from tests.tools_in_process import run

CONFIGS = Path(__file__).parents[2] / 'configs'
CORRUPT = sorted((CONFIGS / 'corrupted_cifar10').glob('*.py'))


def parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def arms(name) -> dict[str, Config]:
    study = load_study(CONFIGS / f'study/{name}.py')
    return {arm.name: run_config(study, Run(arm, 0.1, 0)) for arm in study.arms.values()}


def test_rates_are_table_9s():
    """In the authors' code the first factor of the first layer keeps 3 channels; here it has 3r."""
    networks = {
        name: build_compact_model(cfg) if name == 'compact' else build_expanded_model(cfg)
        for name, cfg in arms('cifar10_smallnet_rates').items()
    }
    assert parameters(networks.pop('compact')) == 66_186
    found = {}
    for network in networks.values():
        first = network.features[0]
        outer, inner, last = first.factors
        # What 3 channels in the place of 3r would have.
        fewer = outer.out_channels - 3
        found[first.rate] = parameters(network) - fewer * (9 * 3 + 1 + 9 * inner.out_channels)
        assert last.out_channels == 8
    table = {0.25: 37.91, 0.5: 42.81, 0.75: 48.43, 1: 54.77, 2: 87.32, 4: 187.0}
    assert list(found) == [*table, 8]
    assert {r: f'{found[r] / 1000:.4g}' for r in table} == {r: f'{n:.4g}' for r, n in table.items()}


def test_the_rates_are_reported_beside_the_arms_that_are_there(tmp_path):
    study = CONFIGS / 'study/cifar10_smallnet_rates.py'
    other = load_study(CONFIGS / 'study/cifar10_smallnet.py')
    rates = load_study(study)
    assert rates.results_dir == other.results_dir
    for name in ('compact', 'ck'):
        assert rates.arms[name].cfg_options == other.arms[name].cfg_options
    assert run('study.py', study, '--report-only', '--out-dir', tmp_path) == (0, '')
    assert 'ck_r025' in (tmp_path / 'study.md').read_text()


@pytest.mark.parametrize('percent', [20, 50, 80])
@pytest.mark.parametrize(('suffix', 'kernel_size'), [('', 9), ('_k5', 5)])
def test_table_7s_arms(percent, suffix, kernel_size):
    kinds = {}
    for name, cfg in arms(f'cifar10_smallnet_corrupt{percent}{suffix}').items():
        corrupt = cfg.train_dataloader.dataset
        assert (corrupt.type, corrupt.fraction) == ('CorruptLabels', percent / 100)
        assert cfg.val_dataloader.dataset == corrupt
        assert (corrupt.dataset.split, cfg.test_dataloader.dataset.split) == ('train', 'test')
        assert cfg.model.kernel_size == kernel_size
        hooks = cfg.get('custom_hooks')
        kinds[name] = hooks and hooks[0].method
    assert kinds == dict(compact=None, cl='cl', ck='ck')


@pytest.fixture(scope='module')
def cifar(tmp_path_factory):
    """Eight images of each of ten classes, two of them held out."""
    root = tmp_path_factory.mktemp('cifar')
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(root / 'cifar10.zip', 'w') as archive:
        for label in range(10):
            for index in range(8):
                image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                content = cv2.imencode('.png', image)[1].tobytes()
                archive.writestr(f'train/{label}/{index}.png', content)
    return root


@pytest.mark.parametrize('config', CORRUPT, ids=lambda path: path.stem)
def test_a_short_training(config, cifar, tmp_path):
    cfg = Config.fromfile(config)
    clean = dict(data_root=str(cifar), val_images=2)
    cfg.train_dataloader.dataset.dataset.update(clean)
    cfg.train_dataloader.batch_size = 30
    cfg.val_dataloader.dataset.update(clean)
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    hooks = [hook for hook in cfg.get('custom_hooks', ()) if hook.type == 'ExpandHook']
    for hook in hooks:
        hook.rate = 1
    confusion = dict(type='GradientConfusionHook', pairs=2)
    cfg.custom_hooks = [*hooks, confusion, *cfg.get('custom_hooks', ())[1:]]
    cfg.work_dir, cfg.launcher = str(tmp_path), 'none'
    runner = build_runner(cfg, ('train', 'val'))
    runner.train()
    percent = int(config.stem[-2:])
    assert runner.train_dataloader.dataset.dataset.pipeline.transforms[0].fraction == percent / 100
    assert (tmp_path / 'gradient_confusion.png').is_file()
    assert (tmp_path / 'compact_last.pth').is_file() == ('expand' in config.stem)


def test_all_of_them_are_there():
    assert len(CORRUPT) == 9
