"""Real, short Runners with the two hooks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import constant_init
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmseg.apis import init_model
from mmseg.models.backbones import UNet
from mmseg.models.segmentors import EncoderDecoder
from torch import nn
from torch.nn.init import trunc_normal_

import mmexpand
from mmexpand import ExpandedConv2d, ExpandedConvTranspose2d
from mmexpand.mm import hooks as hooks_module
from mmexpand.mm.hooks import ExpandHook
from mmexpand.mm.launch import build_runner
from mmexpand.mm.models import build_compact_model, configured_expansions
from mmexpand.surgery import named_units
from mmexpand.surgery.checkpoint import (
    META_KEY,
    contract_state_dict,
    load_checkpoint,
)
from tests.runs import EMA, UNITS, hooks, log_of, train, weights

BLOCKS = [dict(method=name) for name in ('orepa', 'do', 'ac', 'rep', 'acnet', 'repvgg', 'dbb')]
BLOCKS += [
    dict(method='cl', shortcut=True),
    dict(method='cl', norm=True),
    dict(method='repvgg', forward='folded'),
]


def test_train_contract_and_load_in_stock_mmseg(seg_cfg):
    cfg = seg_cfg(**{'default_hooks.checkpoint.save_best': 'mIoU', 'custom_hooks': hooks(EMA)})
    cfg.custom_hooks[-1].evaluate_expanded = True
    runner = train(cfg)
    assert list(named_units(runner.model)) == UNITS
    work_dir = Path(cfg.work_dir)
    names = {path.name for path in work_dir.glob('compact*')}
    assert {name for name in names if not name.endswith('.safetensors')} == {
        'compact_last.pth',
        'compact_best.pth',
        'compact_ema.pth',
        'compact_config.py',
    }
    expected = mmexpand.contract(runner.model).state_dict()
    last = torch.load(work_dir / 'compact_last.pth', weights_only=True)
    assert list(last['state_dict']) == list(expected)
    assert all(torch.equal(last['state_dict'][key], expected[key]) for key in expected)
    assert not torch.equal(
        last['state_dict'][f'{UNITS[0]}.weight'],
        weights(work_dir / 'compact_ema.pth')[f'{UNITS[0]}.weight'],
    )
    report = last['meta'][META_KEY]
    assert report['kind'] == 'compact'
    assert list(report['layers']) == UNITS
    assert 0 < report['max_error'] < 1e-4
    assert report['metrics_compact'] == report['metrics_expanded']
    assert last['meta']['dataset_meta']['classes'][13] == 'car'
    _load_in_stock_mmseg(work_dir)


@pytest.mark.parametrize('expand', [{}, dict(method='do', forward='folded', init='preserve')])
def test_transposed_convolutions_of_a_decoder(seg_cfg, expand):
    cfg = seg_cfg(custom_hooks=hooks(include='backbone.decoder', **expand))
    cfg.model.backbone.upsample_cfg = dict(type='DeconvModule')
    cfg.train_cfg.max_iters = 2
    cfg.default_hooks.checkpoint.interval = 1
    runner = train(cfg)
    name, work_dir = 'backbone.decoder.0.upsample.deconv_upsamping.0', Path(cfg.work_dir)
    assert isinstance(runner.model.get_submodule(name), ExpandedConvTranspose2d)
    first, second = (weights(work_dir / f'iter_{count}.pth') for count in (1, 2))
    last = weights(work_dir / 'compact_last.pth')
    assert not torch.equal(contract_state_dict(first)[f'{name}.weight'], last[f'{name}.weight'])
    assert torch.equal(contract_state_dict(second)[f'{name}.weight'], last[f'{name}.weight'])
    stock = init_model(work_dir / 'compact_config.py', str(work_dir / 'compact_last.pth'), 'cpu')
    stock.load_state_dict(last, strict=True)
    assert type(stock.get_submodule(name)) is nn.ConvTranspose2d
    x = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(stock(x), runner.model.eval()(x), rtol=1e-4, atol=1e-5)


def _load_in_stock_mmseg(work_dir):
    """In a process where mmexpand cannot be imported."""
    script = f"""
import sys
sys.modules['mmexpand'] = None
import torch
from mmengine.config import Config
from mmseg.apis import init_model
from mmseg.models.backbones import UNet
from torch.nn.init import trunc_normal_
for name in ('last', 'best', 'ema'):
    path = r'{work_dir}/compact_' + name + '.pth'
    model = init_model(r'{work_dir}/compact_config.py', path, device='cpu')
    model.load_state_dict(torch.load(path, weights_only=True)['state_dict'], strict=True)
    assert model.dataset_meta['classes'][0] == 'road'
    assert not any('xpand' in type(module).__name__ for module in model.modules())
print('loaded')
"""
    done = subprocess.run(
        [sys.executable, '-c', script], cwd=work_dir, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith('loaded'), done.stderr


def test_optimizer_and_ema_hold_the_factors(seg_cfg):
    optim = dict(
        optimizer=dict(type='SGD', lr=0.01),
        paramwise_cfg=dict(custom_keys={'backbone.encoder': dict(lr_mult=0.1)}),
        clip_grad=dict(max_norm=1.0),
        accumulative_counts=2,
    )
    cfg = seg_cfg(custom_hooks=hooks(EMA))
    cfg.optim_wrapper = optim
    runner = train(cfg)
    groups = runner.optim_wrapper.param_groups
    held = {parameter for group in groups for parameter in group['params']}
    # mmengine adds an empty group of its own for base_param_settings.
    assert held - {p for p in held if p.dim() == 0} == set(runner.model.parameters())
    factors = set(named_units(runner.model)[UNITS[0]].parameters())
    rates = {g['lr'] for g in groups if factors & set(g['params'])}
    others = {g['lr'] for g in groups if not any('encoder' in n for n in _names(runner, g))}
    assert max(rates) < 0.2 * min(others)
    ema = next(hook for hook in runner.hooks if isinstance(hook, EMAHook))
    assert list(named_units(ema.ema_model.module)) == UNITS


def _names(runner, group):
    members = set(group['params'])
    return [name for name, p in runner.model.named_parameters() if p in members]


def test_factors_get_the_frameworks_initialisation(seg_cfg):
    # UNet asks for Kaiming with fan_out; torch's own start has a smaller spread.
    runner = train(seg_cfg(**{'train_cfg.max_iters': 0, 'custom_hooks': hooks(rate=32)}))
    unit = named_units(runner.model)[UNITS[0]]
    weight = unit.factors[1].weight
    out = weight.shape[0] * 9
    assert weight.std().item() == pytest.approx((2 / out) ** 0.5, rel=0.05)


@MODELS.register_module()
class OwnInit(UNet):
    """Writes to layers itself, as detection heads do, and has a start in its init_cfg."""

    def init_weights(self):
        super().init_weights()
        constant_init(self.encoder[0][0].convs[0].conv, 0.25)
        trunc_normal_(self.encoder[1][1].convs[0].conv.weight, std=0.02)


@pytest.mark.parametrize('init', ['default', 'preserve'])
@pytest.mark.parametrize('by', ['hook', 'builder'])
@pytest.mark.parametrize('method', ['cl', 'orepa'])
def test_a_networks_own_init_weights_reaches_the_factors(seg_cfg, init, by, method):
    how = dict(init=init, rate=2, method=method)
    cfg = seg_cfg(**{'train_cfg.max_iters': 0, 'custom_hooks': hooks(**how)})
    cfg.model.backbone.type = 'OwnInit'
    if by == 'builder':
        cfg.custom_hooks = [dict(type='ContractHook')]
        cfg.model = dict(type='ExpandModel', model=cfg.model, include='backbone.encoder', **how)
    found = mmexpand.contract(train(cfg).model).state_dict()
    constant = found[f'{UNITS[0]}.weight']
    torch.testing.assert_close(constant, torch.full_like(constant, 0.25), rtol=1e-4, atol=1e-5)
    assert found[f'{UNITS[1]}.weight'].std().item() == pytest.approx(0.02, rel=0.3)
    assert found[f'{UNITS[2]}.weight'].std().item() > 0.05


@MODELS.register_module()
class OwnInitOfAll(EncoderDecoder):
    """Writes to all parameters of a part after its parent's initialisation, as DETR does."""

    calls = 0

    def init_weights(self):
        super().init_weights()
        OwnInitOfAll.calls += 1
        for parameter in self.backbone.parameters():
            if parameter.dim() > 1:
                trunc_normal_(parameter, std=0.02)


@pytest.mark.parametrize('by', ['ExpandHook', 'ExpandModel'])
def test_what_is_preserved_is_initialised_once(seg_cfg, by):
    how = dict(include='backbone.encoder', method='cl', init='preserve', rate=2)
    cfg = seg_cfg(**{'train_cfg.max_iters': 0, 'custom_hooks': [dict(type='ContractHook')]})
    cfg.model.type = 'OwnInitOfAll'
    if by == 'ExpandHook':
        cfg.custom_hooks.insert(0, dict(type=by, **how))
    else:
        cfg.model = dict(type=by, model=cfg.model, **how)
    OwnInitOfAll.calls = 0
    model = train(cfg).model
    assert OwnInitOfAll.calls == 1
    for name in UNITS:
        assert named_units(model)[name].weight.std().item() == pytest.approx(0.02, rel=0.3)
    # It is the class's own again.
    model.init_weights()
    assert OwnInitOfAll.calls == 2


@pytest.mark.parametrize('by', ['hook', 'builder'])
def test_the_expansion_is_logged_once(seg_cfg, by):
    cfg = seg_cfg(**{'train_cfg.max_iters': 0})
    if by == 'hook':
        cfg.custom_hooks = hooks()[:1]
    else:
        cfg.custom_hooks = []
        cfg.model = dict(
            type='ExpandModel', method='cl', model=cfg.model, include='backbone.encoder', rate=2
        )
    train(cfg)
    log = log_of(cfg)
    assert log.count('Expanding 3 layers: ') == 1
    for name in UNITS:
        assert len(re.findall(rf'^{re.escape(name)} +cl +', log, re.MULTILINE)) == 1
        # mmengine logs how each factor was initialised.
        assert len(re.findall(rf'{re.escape(name)}(?!\.)', log)) == 1


def test_contract_hook_alone_warns_and_training_goes_on(seg_cfg, caplog):
    cfg = seg_cfg(custom_hooks=[dict(type='ContractHook')])
    assert train(cfg).iter == 4
    log = log_of(cfg)
    assert 'nothing in this model is expanded' in log
    assert not list(Path(cfg.work_dir).glob('compact*'))


@pytest.mark.parametrize('large', [True, False])
def test_a_merged_channel_far_above_the_others_is_named(seg_cfg, large):
    name = 'backbone.encoder.1.1.convs.1.conv'

    class LargeScale(Hook):
        def after_train(self, runner):
            for module in named_units(runner.model)[name].modules():
                if isinstance(module, nn.BatchNorm2d) and large:
                    module.weight.data[3] = 300

    cfg = seg_cfg(custom_hooks=hooks(include=name, method='repvgg'))
    runner = Runner.from_cfg(cfg)
    runner.register_hook(LargeScale())
    runner.train()
    log = log_of(cfg)
    words = f'WARNING - compact_last.pth: {name}: channel 3 has a weight of'
    assert (words in log) == large


def test_preserve_starts_from_the_frameworks_weights(seg_cfg, monkeypatch):
    seen = {}
    expand = hooks_module.expand_

    def spy(model, cfg):
        seen.update((name, model.get_submodule(name).weight.clone()) for name in UNITS)
        return expand(model, cfg)

    monkeypatch.setattr(hooks_module, 'expand_', spy)
    expand_hook = hooks(init='preserve', rate=1.5)
    runner = train(seg_cfg(**{'train_cfg.max_iters': 0, 'custom_hooks': expand_hook}))
    for name, weight in seen.items():
        folded = named_units(runner.model)[name].weight
        torch.testing.assert_close(folded, weight, rtol=1e-4, atol=1e-5)
        # UNet's Kaiming start, which has more spread than torch's own.
        assert weight.std().item() == pytest.approx((2 / (9 * len(weight))) ** 0.5, rel=0.3)


def test_a_test_run_initialises_nothing(seg_cfg, monkeypatch):
    cfg = seg_cfg(custom_hooks=hooks(init='preserve'))
    expected = mmexpand.contract(train(cfg).model).state_dict()
    tested = Runner.from_cfg(
        seg_cfg(
            custom_hooks=hooks(init='preserve'),
            load_from=f'{cfg.work_dir}/iter_4.pth',
            work_dir=cfg.work_dir + '2',
        )
    )
    monkeypatch.setattr(type(tested.model), 'init_weights', lambda self: pytest.fail('initialised'))
    tested.test()
    assert list(tested.model.state_dict()) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(tested.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('how', BLOCKS, ids=str)
def test_every_block_from_a_config(seg_cfg, how):
    """By the hook and by the builder; what is written loads strictly and is compact."""
    hooked = seg_cfg(custom_hooks=hooks(**how))
    built = seg_cfg(custom_hooks=[dict(type='ContractHook')], work_dir=hooked.work_dir + '2')
    built.model = dict(
        type='ExpandModel', model=built.model, include='backbone.encoder', rate=2, **how
    )
    for cfg in (hooked, built):
        runner = train(cfg)
        assert list(named_units(runner.model)) == UNITS
        compact = build_compact_model(cfg)
        compact.load_state_dict(weights(f'{cfg.work_dir}/compact_last.pth'))
        # Without a model, from the checkpoint alone.
        expanded = load_checkpoint(f'{cfg.work_dir}/iter_4.pth')['state_dict']
        for name, value in contract_state_dict(expanded).items():
            torch.testing.assert_close(value, compact.state_dict()[name])


@pytest.mark.parametrize('type_', ['ExpandModel', 'ExpandBackbone'])
def test_builders(seg_cfg, type_):
    cfg, how = seg_cfg(custom_hooks=[dict(type='ContractHook'), EMA]), dict(method='cl', rate=2)
    if type_ == 'ExpandModel':
        cfg.model = dict(type=type_, model=cfg.model, include='backbone.encoder', **how)
    else:
        cfg.model.backbone = dict(type=type_, backbone=cfg.model.backbone, include='encoder', **how)
    runner = train(cfg)
    assert list(named_units(runner.model)) == UNITS
    assert type(runner.model).__name__ == 'EncoderDecoder'
    hooked = train(seg_cfg(work_dir=cfg.work_dir + '2'))
    assert list(runner.model.state_dict()) == list(hooked.model.state_dict())
    ours, theirs = (
        load_checkpoint(f'{c}/compact_last.pth') for c in (cfg.work_dir, cfg.work_dir + '2')
    )
    assert list(ours['state_dict']) == list(theirs['state_dict'])
    text = Path(f'{cfg.work_dir}/compact_config.py').read_text()
    assert 'xpand' not in text.replace(cfg.work_dir, '')


def test_the_compact_computation_validates(seg_cfg, monkeypatch):
    calls = []
    layerwise = ExpandedConv2d._apply_branches
    monkeypatch.setattr(
        ExpandedConv2d,
        '_apply_branches',
        lambda self, x: calls.append(self.training) or layerwise(self, x),
    )
    cfg = seg_cfg(custom_hooks=hooks(forward='layerwise')[:1])
    train(cfg)
    assert calls
    assert all(calls), 'the chain ran in eval mode'


def test_frozen_layers_are_named(seg_cfg, monkeypatch):
    class Frozen(UNet):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.encoder[0].requires_grad_(False)

    MODELS.register_module(name='Frozen', module=Frozen, force=True)
    lines = []
    monkeypatch.setattr('mmexpand.mm.hooks.log', lambda line, *_: lines.append(line))
    cfg = seg_cfg(custom_hooks=hooks(), **{'train_cfg.max_iters': 1})
    train(cfg)
    assert not any('are frozen' in line for line in lines)
    cfg.model.backbone.type = 'Frozen'
    cfg.experiment_name = 'frozen'
    train(cfg)
    (line,) = [line for line in lines if 'are frozen' in line]
    assert f'1 expanded layers are frozen, {UNITS[0]} first' in line


class Statistics(Hook):
    """The running variance of a norm in a branch after each iteration."""

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, *_, **__):
        unit = next(iter(named_units(runner.model).values()))
        self.seen.append(unit._norms[0].norm.running_var.clone())


def test_norms_are_frozen_at_their_time(seg_cfg):
    cfg = seg_cfg(custom_hooks=hooks(method='repvgg', freeze_norms=0.5))
    assert [expansion.method for _, expansion in configured_expansions(cfg)] == ['repvgg']
    runner = build_runner(cfg, ('train', 'val'))
    statistics = Statistics()
    runner.register_hook(statistics)
    runner.train()
    first, second, third, last = statistics.seen
    assert not torch.equal(first, second)
    assert torch.equal(second, third)
    assert torch.equal(second, last)
    with pytest.raises(ValueError, match='freeze_norms'):
        ExpandHook(method='cl', freeze_norms=2)
