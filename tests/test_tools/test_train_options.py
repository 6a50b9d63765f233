"""``tools/train.py CONFIG --include ... --method ...`` expands a config that has no hooks."""

import json

import pytest
from mmengine.config import Config

from mmexpand.mm.models import set_expansion
from mmexpand.surgery.checkpoint import META_KEY, load_checkpoint
from tests.conftest import small_config
from tests.runs import train
from tests.tools_in_process import TOOLS, run, run_apart


@pytest.fixture
def plain(street, tmp_path):
    cfg = small_config(street, tmp_path / 'work_dir')
    cfg.custom_hooks = []
    cfg.pop('custom_imports')
    cfg.dump(tmp_path / 'plain.py')
    return tmp_path / 'plain.py'


def test_options_expand_a_config_and_metrics_reach_the_visualizer(plain, tmp_path):
    done = run_apart(TOOLS / 'train.py', plain, '--include', 'backbone.encoder', '--method', 'bn')
    assert done.returncode == 0, done.stderr
    found = load_checkpoint(tmp_path / 'work_dir/compact_last.pth')['meta'][META_KEY]
    assert found['layers'] and all(layer['method'] == 'bn' for layer in found['layers'].values())
    assert all(name.startswith('backbone.encoder') for name in found['layers'])
    (log,) = (tmp_path / 'work_dir').glob('*/vis_data/scalars.json')
    last = json.loads(log.read_text().splitlines()[-1])
    assert last['compact/last/mIoU'] == found['metrics_compact']['mIoU']
    assert last['step'] == 4
    # The config in the work dir can be tested and resumed without the options.
    kept = Config.fromfile(tmp_path / 'work_dir/plain.py')
    assert kept.default_hooks.expand == dict(
        type='ExpandHook', include=['backbone.encoder'], method='bn'
    )
    kept.resume = True  # As after --resume.
    kept.dump(tmp_path / 'kept.py')
    assert run('test.py', tmp_path / 'kept.py', tmp_path / 'work_dir/iter_4.pth')[0] == 0


def test_auto_scale_lr_gives_the_rate_of_the_compact_network(seg_cfg):
    """mmengine scales the optimizer only before it builds the schedulers."""
    cfg = seg_cfg(auto_scale_lr=dict(enable=True, base_batch_size=16))
    assert cfg.param_scheduler
    found = {group['initial_lr'] for group in train(cfg).optim_wrapper.param_groups}
    assert found == {cfg.optim_wrapper.optimizer.lr * cfg.train_dataloader.batch_size / 16}


def test_without_options_nothing_changes(plain):
    cfg = Config.fromfile(plain)
    set_expansion(cfg, {})
    assert cfg.to_dict() == Config.fromfile(plain).to_dict()


def test_options_replace_those_of_the_config(street, tmp_path):
    cfg = small_config(street, tmp_path)
    set_expansion(cfg, dict(method='bn'))
    assert [dict(hook) for hook in cfg.custom_hooks] == [
        dict(type='ExpandHook', include='backbone.encoder', rate=2, method='bn'),
        dict(type='ContractHook'),
    ]
    assert 'expand' not in cfg.default_hooks


def test_resume_without_a_checkpoint_starts_from_load_from(plain, tmp_path):
    """As a job does that may be interrupted and always passes --resume."""
    cfg = Config.fromfile(plain)
    train(Config(dict(cfg, work_dir=str(tmp_path / 'given'))))
    given = tmp_path / 'given/iter_4.pth'
    arguments = (TOOLS / 'train.py', plain, '--work-dir', tmp_path / 'fresh', '--resume')
    arguments += ('--cfg-options', f'load_from={given}')
    assert f'Load checkpoint from {given}' in run_apart(*arguments).stdout
    assert 'resumed epoch: 0, iter: 4' in run_apart(*arguments).stdout
