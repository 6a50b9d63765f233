"""Runners, wrappers and options that the hooks support or refuse."""

from pathlib import Path

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.hooks import EMAHook
from mmengine.model import MMSeparateDistributedDataParallel
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

import mmexpand
from mmexpand.mm.hooks import ExpandHook
from mmexpand.mm.launch import build_runner
from mmexpand.surgery import named_units
from tests.runs import EMA, hooks, train


@pytest.mark.parametrize('kind', ['Runner', 'FlexibleRunner'])
def test_the_latest_whole_checkpoint_is_resumed(seg_cfg, kind):
    """Also by a Runner that loads before it asks its hooks."""
    changes = dict(custom_hooks=[])
    if kind == 'FlexibleRunner':
        strategy = dict(type='SingleDeviceStrategy')
        changes.update(strategy=strategy, env_cfg=dict(), runner_type=kind)
    whole = seg_cfg(**changes)
    build_runner(whole, ('train', 'val')).train()
    last = Path(whole.work_dir) / 'iter_4.pth'
    last.write_bytes(last.read_bytes()[:1000])
    (last.parent / 'last_checkpoint').write_text(str(last))
    cfg = seg_cfg(**changes, resume=True)
    cfg.work_dir = whole.work_dir
    runner = build_runner(cfg, ('train', 'val'))
    runner.train()
    assert runner._load_from.endswith('iter_2.pth')
    assert runner.iter == 4


def test_runners_that_cannot_be_rebuilt_name_the_builder(seg_cfg):
    cfg = seg_cfg(
        strategy=dict(type='SingleDeviceStrategy'), env_cfg=dict(), runner_type='FlexibleRunner'
    )
    runner = FlexibleRunner.from_cfg(cfg)
    with pytest.raises(RuntimeError, match='ExpandModel'):
        runner.train()


@pytest.mark.parametrize('by', ['hook', 'builder'])
def test_tracing_is_refused_in_words(seg_cfg, by):
    cfg = seg_cfg(efficient_conv_bn_eval='backbone', custom_hooks=hooks())
    if by == 'builder':
        cfg.model = dict(type='ExpandModel', method='cl', model=cfg.model, include='backbone')
        cfg.custom_hooks = [dict(type='ContractHook')]
    with pytest.raises(ValueError, match='efficient_conv_bn_eval does not support'):
        train(cfg)
    assert not list(Path(cfg.work_dir).glob('*.pth'))


@pytest.mark.parametrize('forward', ['folded', 'layerwise'])
def test_efficient_conv_bn_eval_of_a_conv_module(forward):
    """Its norm, in eval mode, is folded into the kernel that it reads from the unit."""
    torch.manual_seed(0)
    options = dict(padding=1, norm_cfg=dict(type='BN'), act_cfg=None)
    module = ConvModule(4, 8, 3, efficient_conv_bn_eval=True, **options).double()
    mmexpand.expand_(module, mmexpand.ExpandConfig(method='cl', forward=forward))
    module.bn.eval()
    module.bn.running_mean.normal_()
    module.bn.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    parameters = list(module.parameters())
    expected = module.bn(module.conv.forward_layerwise(x))
    assert module.conv.training
    torch.testing.assert_close(module(x), expected)
    gradients = (torch.autograd.grad(y.square().sum(), parameters) for y in (module(x), expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ('expand', 'words'),
    [
        (dict(method='cx'), 'method must be one of'),
        (dict(rate=0), 'rate must be'),
        (dict(rates=4), 'rates'),
        (dict(include='backbone.encodr'), 'near matches: backbone.encoder'),
        (dict(method='ck'), '3x3'),
        (dict(init='preserve', rate=0.5), 'cannot preserve'),
    ],
)
def test_bad_input_is_refused_before_training(seg_cfg, expand, words):
    cfg = seg_cfg(custom_hooks=hooks(**expand))
    with pytest.raises((ValueError, TypeError), match=words):
        train(cfg)
    assert not list(Path(cfg.work_dir).glob('*.pth'))


def test_expand_hook_runs_before_ema_hook_wherever_it_stands(seg_cfg):
    runner = Runner.from_cfg(seg_cfg(custom_hooks=[EMA, *hooks()]))
    kinds = [type(hook) for hook in runner.hooks]
    assert kinds.index(ExpandHook) < kinds.index(EMAHook)


def test_a_compiled_training_is_the_same(seg_cfg):
    repvgg = dict(method='repvgg', forward='folded', include='backbone.encoder.1.1.convs.0')
    chain, other = hooks(include='backbone.encoder.0')[0], hooks(**repvgg)[0]
    models = []
    for options in ({}, dict(compile=dict(backend='aot_eager'))):
        cfg = seg_cfg(
            custom_hooks=[chain, other, dict(type='ContractHook')],
            **{'train_cfg.max_iters': 2, 'optim_wrapper.clip_grad': dict(max_norm=0.1)},
            **options,
        )
        cfg.experiment_name = f'compiled{bool(options)}'
        models.append(train(cfg).model.state_dict())
        assert (Path(cfg.work_dir) / 'compact_last.pth').exists()
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_an_expand_hook_told_to_run_after_ema_hook_is_refused(seg_cfg):
    late = dict(hooks()[0], priority='LOW')
    with pytest.raises(ValueError, match=r'EMAHook comes before ExpandHook.*VERY_HIGH'):
        train(seg_cfg(custom_hooks=[EMA, late]))


class OwnRunner(Runner):
    """A user's Runner."""


def test_a_runner_of_ones_own_has_options_by_layer_too(seg_cfg):
    cfg = seg_cfg(custom_hooks=[dict(type='ContractHook')])
    cfg.model = dict(type='ExpandModel', method='cl', model=cfg.model, include='backbone')
    cfg.optim_wrapper.clip_grad = dict(max_norm=1.0)
    runner = OwnRunner.from_cfg(cfg)
    runner.train()
    units = named_units(runner.model).values()
    assert units
    assert all(unit.kernel.gradient.enabled for unit in units)


@pytest.mark.parametrize('by', ['hook', 'builder'])
def test_a_wrapper_that_is_unsupported_is_refused(seg_cfg, by):
    cfg = seg_cfg(custom_hooks=hooks())
    if by == 'builder':
        cfg.model = dict(type='ExpandModel', method='cl', model=cfg.model, include='backbone')
        cfg.custom_hooks = [dict(type='ContractHook')]
    runner = Runner.from_cfg(cfg)
    wrapper = MMSeparateDistributedDataParallel.__new__(MMSeparateDistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = runner.model
    runner.model = wrapper
    with pytest.raises(RuntimeError, match='does not support expanded models'):
        runner.call_hook('before_run')
