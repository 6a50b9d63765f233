"""How a network is started (Sec. 5.3): from an untrained ExpandNet, from a nonlinear one."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

import mmexpand
from mmexpand.mm.models import build_compact_model
from mmexpand.surgery.checkpoint import META_KEY, CheckpointError, load_checkpoint
from tests.runs import train

CONFIGS = Path(__file__).parents[2] / 'configs/smallnet'
LINEAR = dict(type='ExpandHook', include='backbone.encoder', method='cl', rate=2)
NONLINEAR = dict(LINEAR, nonlinear='relu')
CONTRACT = dict(type='ContractHook')


@HOOKS.register_module(force=True)
class KeepFirst(Hook):
    """Keeps the weights that training starts with."""

    def before_train(self, runner):
        runner.first = {k: v.clone() for k, v in runner.model.state_dict().items()}


def weights(path) -> dict:
    return load_checkpoint(path)['state_dict']


def test_a_compact_network_starts_from_an_untrained_expanded_one(seg_cfg):
    """The paper's control: no iteration, and what ContractHook writes is what it started as."""
    untrained = seg_cfg(
        **{
            'train_cfg.max_iters': 0,
            'custom_hooks': [LINEAR, CONTRACT],
            'work_dir': seg_cfg().work_dir + '_untrained',
        }
    )
    expanded = train(untrained).model
    path = f'{untrained.work_dir}/compact_last.pth'
    compact = train(seg_cfg(custom_hooks=[dict(type='KeepFirst')], load_from=path))
    expected = mmexpand.contract(expanded).state_dict()
    own = train(seg_cfg(custom_hooks=[dict(type='KeepFirst')])).first
    assert list(compact.first) == list(expected) == list(own)
    for name, value in compact.first.items():
        assert torch.equal(value, expected[name]), name
    assert not torch.equal(compact.first[KERNEL], own[KERNEL])
    assert not torch.equal(compact.model.state_dict()[KERNEL], compact.first[KERNEL])


KERNEL = 'backbone.encoder.1.1.convs.0.conv.weight'


@pytest.fixture
def nonlinear(seg_cfg):
    """A finished first stage."""
    cfg = seg_cfg(custom_hooks=[NONLINEAR], work_dir=seg_cfg().work_dir + '_nonlinear')
    runner = train(cfg)
    runner.path = f'{cfg.work_dir}/iter_4.pth'
    runner.said = cfg
    return runner


def test_an_expanded_network_starts_from_its_nonlinear_counterpart(seg_cfg, nonlinear):
    before = weights(nonlinear.path)
    assert list(before) == list(nonlinear.model.state_dict())
    meta = load_checkpoint(nonlinear.path)['meta'][META_KEY]
    assert meta['kind'] == 'expanded'
    assert {layer['method'] for layer in meta['layers'].values()} == {'cl'}
    assert {layer['nonlinear'] for layer in meta['layers'].values()} == {'relu'}
    cfg = seg_cfg(custom_hooks=[LINEAR, dict(type='KeepFirst'), CONTRACT], load_from=nonlinear.path)
    second = train(cfg)
    assert list(second.first) == list(before)
    for name, value in before.items():
        assert torch.equal(second.first[name], value), name
    compact = load_checkpoint(f'{cfg.work_dir}/compact_last.pth')
    assert compact['meta'][META_KEY]['max_error'] < 1e-4
    assert compact['meta'][META_KEY]['metrics_compact']['mIoU'] > 0


def test_the_nonlinear_network_is_what_is_evaluated(seg_cfg, nonlinear):
    batch = dict(inputs=torch.randn(2, 3, 32, 48))
    trained = nonlinear.model.eval()(**batch, mode='tensor')
    tested = Runner.from_cfg(seg_cfg(custom_hooks=[NONLINEAR], load_from=nonlinear.path))
    tested.test()
    assert torch.equal(tested.model(**batch, mode='tensor'), trained)


def test_it_resumes(seg_cfg, nonlinear):
    cfg = seg_cfg(custom_hooks=[NONLINEAR], resume=True)
    cfg.load_from = nonlinear.path.replace('iter_4', 'iter_2')
    resumed = train(cfg).model.state_dict()
    for name, value in nonlinear.model.state_dict().items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-7)


def test_contract_hook_refuses_it_at_the_start(seg_cfg):
    cfg = seg_cfg(custom_hooks=[NONLINEAR, CONTRACT])
    message = r'0\.0\.convs\.0\.conv cannot be contracted: it has ReLU.*with load_from'
    with pytest.raises(ValueError, match=message):
        train(cfg)
    assert not list(Path(cfg.work_dir).glob('*.pth'))


@pytest.mark.parametrize(
    ('hooks', 'changes'),
    [
        ([CONTRACT], {}),
        ([dict(LINEAR, rate=3)], {}),
        ([dict(LINEAR, method='rep')], {}),
        ([LINEAR], dict(resume=True)),
    ],
    ids=['compact', 'rate', 'block', 'resume'],
)
def test_it_starts_nothing_else(seg_cfg, nonlinear, hooks, changes):
    cfg = seg_cfg(custom_hooks=hooks, load_from=nonlinear.path, **changes)
    with pytest.raises(CheckpointError, match=r'has ReLU between its factors.*in the checkpoint'):
        train(cfg)


def test_neither_is_tested_as_the_other(seg_cfg, nonlinear):
    with pytest.raises(CheckpointError, match=r'has ReLU.*in the checkpoint'):
        Runner.from_cfg(seg_cfg(custom_hooks=[LINEAR], load_from=nonlinear.path)).test()
    linear = seg_cfg(**{'custom_hooks': [LINEAR], 'train_cfg.max_iters': 2})
    train(linear)
    path = f'{linear.work_dir}/iter_2.pth'
    with pytest.raises(CheckpointError, match=r'has ReLU.*in the model'):
        Runner.from_cfg(seg_cfg(custom_hooks=[NONLINEAR], load_from=path)).test()


def test_configs_name_what_the_stage_before_writes():
    control = Config.fromfile(CONFIGS / 'smallnet-k7_init-ck-r4_1xb128-150e_cifar10.py')
    compact = Config.fromfile(CONFIGS / 'smallnet-k7_1xb128-150e_cifar10.py')
    assert control.load_from.endswith('/compact_last.pth')
    assert dict(control, load_from=None) == dict(compact, load_from=None)
    first = CONFIGS / 'smallnet-k7_expand-ck-r4_nonlinear_1xb128-150e_cifar10.py'
    second = Config.fromfile(
        CONFIGS / 'smallnet-k7_expand-ck-r4_from-nonlinear_1xb128-150e_cifar10.py'
    )
    assert second.load_from == f'work_dirs/{first.stem}/epoch_150.pth'
    hooks = Config.fromfile(first).custom_hooks
    assert hooks == [dict(second.custom_hooks[0], nonlinear='relu')]
    parts = [build_compact_model(Config.fromfile(first)), build_compact_model(second)]
    for model, hook in zip(parts, (hooks[0], second.custom_hooks[0]), strict=True):
        fields = {key: value for key, value in hook.items() if key != 'type'}
        mmexpand.expand_(model, mmexpand.ExpandConfig(**fields))
    parts[1].load_state_dict(parts[0].state_dict(), strict=True)
