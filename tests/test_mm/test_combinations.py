"""Several expansions of one model, layers that are shared, and averages."""

import itertools
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmseg.models import EncoderDecoder
from torch import nn

from mmexpand.mm import dry_run_training
from mmexpand.mm.command_line import expansion_of
from mmexpand.mm.compact_config import hook_configs
from mmexpand.mm.models import build_compact_model, configured_expansions, set_expansion
from mmexpand.surgery import named_units
from mmexpand.surgery.checkpoint import contract_state_dict, load_checkpoint

ROOT = Path(__file__).parents[2]
KAIMING = dict(type='Kaiming', layer='Conv2d')


def expand(include, method='cl', **how):
    return dict(type='ExpandHook', include=include, method=method, rate=2, **how)


class Head(BaseModule):
    """Two names of one layer, as RTMDet's head has them, behind a layer of its own."""

    def __init__(self):
        super().__init__(init_cfg=KAIMING)
        one = nn.Conv2d(3, 3, 3, padding=1)
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1), one, one])

    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
        return x


@MODELS.register_module()
class SharedHead(EncoderDecoder):
    """A segmentor with a layer that has two names."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.front = Head()

    def extract_feat(self, inputs):
        return super().extract_feat(self.front(inputs))


SHARED = {'model.type': 'SharedHead'}
NAMES = {'front.convs.0', 'front.convs.1', 'front.convs.2'}


def test_a_layer_that_is_shared_is_resumed_and_written(seg_cfg):
    changes = {
        **SHARED,
        'custom_hooks': [expand('front'), dict(type='ContractHook')],
        'default_hooks.checkpoint.save_best': 'mIoU',
    }
    whole = seg_cfg(**changes)
    Runner.from_cfg(whole).train()
    work_dir = Path(whole.work_dir)
    best = load_checkpoint(work_dir / 'compact_best.pth')['state_dict']
    assert {f'{name}.weight' for name in NAMES} <= set(best)
    for name in ('weight', 'bias'):
        assert torch.equal(best[f'front.convs.1.{name}'], best[f'front.convs.2.{name}'])
    resumed = seg_cfg(**changes, load_from=str(work_dir / 'iter_2.pth'), resume=True)
    Runner.from_cfg(resumed).train()
    first, second = (
        load_checkpoint(Path(cfg.work_dir) / 'compact_last.pth')['state_dict']
        for cfg in (whole, resumed)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


class Look(Hook):
    """The units' kernels, and the other weights, before the first iteration."""

    priority = 'LOWEST'

    def before_train(self, runner):
        self.weights = {name: u.weight.detach() for name, u in named_units(runner.model).items()}


def start(cfg) -> dict[str, torch.Tensor]:
    runner = Runner.from_cfg(cfg)
    look = Look()
    runner.register_hook(look)
    runner.train()
    return look.weights


def test_a_later_hook_preserves_what_the_framework_initialises(seg_cfg):
    """Though another has expanded a part before, whose factors are initialised as well."""
    found = start(
        seg_cfg(
            **SHARED,
            custom_hooks=[expand('backbone.encoder'), expand('front', init='preserve')],
        )
    )
    # Kaiming's normal, fan out 27: the paper's start of three factors is another.
    weights = torch.cat([found[name].flatten() for name in ('front.convs.0', 'front.convs.1')])
    assert weights.std() == pytest.approx((2 / 27) ** 0.5, rel=0.2)


def test_the_other_order_is_refused(seg_cfg):
    later = expand('backbone.encoder', init='default')
    cfg = seg_cfg(custom_hooks=[expand('decode_head', init='preserve'), later])
    with pytest.raises(ValueError, match=r"init='default' comes after one with 'preserve'.*first"):
        Runner.from_cfg(cfg).train()


def test_a_parents_init_cfg_over_a_builder_that_preserves_is_refused(seg_cfg):
    cfg = seg_cfg(custom_hooks=[dict(type='ContractHook')])
    backbone = cfg.model.backbone
    cfg.model.backbone = dict(
        type='mmengine.ExpandBackbone',
        method='cl',
        backbone=backbone,
        include='encoder',
        init='preserve',
    )
    cfg.model.init_cfg = dict(type='Normal', layer='Conv2d', std=0.02)
    override = dict(type='Normal', name='backbone', std=0.02)
    refused = [
        cfg.model.init_cfg,
        dict(type='Normal', layer='_ConvNd', std=0.02),
        dict(type='Normal', override=override),
    ]
    # With nothing to resume it starts again.
    for cfg.model.init_cfg, cfg.resume in itertools.product(refused, (False, True)):
        words = r'model\.init_cfg would overwrite the preserved weights of backbone: .*Hook'
        with pytest.raises(ValueError, match=words):
            Runner.from_cfg(cfg).train()
    # No factor is one.
    cfg.model.init_cfg = dict(type='Constant', layer='BatchNorm2d', val=1)
    cfg.resume = False
    Runner.from_cfg(cfg).train()


def test_a_given_optimizer_takes_up_what_two_hooks_expand(seg_cfg):
    cfg = seg_cfg(**SHARED, custom_hooks=[expand('backbone.encoder'), expand('front')])
    model = build_compact_model(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    runner = Runner(
        model=model,
        work_dir=cfg.work_dir,
        train_dataloader=cfg.train_dataloader,
        train_cfg=dict(by_epoch=False, max_iters=1),
        optim_wrapper=OptimWrapper(optimizer),
        custom_hooks=cfg.custom_hooks,
        default_scope='mmseg',
    )
    runner.train()
    held = {id(p) for group in optimizer.param_groups for p in group['params']}
    assert held == {id(p) for p in model.parameters()}
    assert NAMES - {'front.convs.2'} <= set(named_units(model))


def test_averages_and_folded_weights_agree_without_contract_hook(seg_cfg):
    """As where a user's own train.py knows of no other hook of ours."""
    ema = dict(type='EMAHook', momentum=0.5)
    cfg = seg_cfg(custom_hooks=[expand('backbone.encoder'), ema])
    Runner.from_cfg(cfg).train()
    found = load_checkpoint(Path(cfg.work_dir) / 'iter_4.pth')['state_dict']
    for name, value in contract_state_dict(found).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    raw = load_checkpoint(Path(cfg.work_dir) / 'iter_4.pth')['ema_state_dict']
    assert any(not torch.equal(raw[f'module.{k}'], v) for k, v in found.items() if 'factors' in k)


def test_options_of_plan_change_what_the_config_says():
    config = 'configs/smallnet/smallnet-k7_expand-ck-r4_1xb128-150e_cifar10.py'
    cfg = Config.fromfile(ROOT / config)
    args = Namespace(config=config, method=None, rate=2.0, include=None, exclude=None)
    set_expansion(cfg, expansion_of(args))
    ((name, expansion),) = configured_expansions(cfg)
    assert (name, expansion.method, expansion.rate, expansion.include) == (
        '',
        'ck',
        2,
        ('features',),
    )


@pytest.mark.parametrize('by', ['hook', 'builder', 'nothing'])
def test_options_of_a_dry_run_change_what_the_config_says(seg_cfg, monkeypatch, by):
    cfg = seg_cfg(custom_hooks=[expand('backbone.encoder', method='ck')])
    if by != 'hook':
        cfg.custom_hooks = []
    if by == 'builder':
        cfg.model = dict(
            type='ExpandModel', method='cl', model=cfg.model, include='backbone.encoder', rate=4
        )
    tried = []

    def stop(cfg, splits):
        tried.append(cfg)
        raise InterruptedError

    monkeypatch.setattr(dry_run_training, 'build_runner', stop)
    with pytest.raises(InterruptedError):
        options = dict(rate=3) if by != 'nothing' else dict(method='cl', rate=3)
        set_expansion(cfg, options)
        dry_run_training.dry_run_training(cfg)
    (found,) = tried
    hooks = [hook for hook in hook_configs(found) if hook['type'] == 'ExpandHook']
    if by == 'builder':
        assert hooks == []
        assert (found.model.rate, found.model.include) == (3, 'backbone.encoder')
    else:
        (hook,) = hooks
        kept = dict(include='backbone.encoder', method='ck') if by == 'hook' else {'method': 'cl'}
        assert hook == dict(type='ExpandHook', rate=3, **kept)
