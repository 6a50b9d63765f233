"""Checkpoints of both kinds are resumed, loaded and refused."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmseg.apis import init_model

import mmexpand
from mmexpand.mm.checkpoints import describe_units, match_checkpoint, unwrap
from mmexpand.mm.launch import build_runner
from mmexpand.mm.models import build_compact_model
from mmexpand.surgery.checkpoint import (
    META_KEY,
    CheckpointError,
    contract_state_dict,
    load_checkpoint,
)
from tests.runs import EMA, UNITS, hooks, train, weights


def test_resume_gives_the_same_as_not_stopping(seg_cfg):
    cfg = seg_cfg(custom_hooks=hooks(EMA))
    whole = train(cfg)
    checkpoint = Path(cfg.work_dir) / 'iter_2.pth'
    resumed_cfg = seg_cfg(
        custom_hooks=hooks(EMA), resume=True, load_from=str(checkpoint), work_dir=cfg.work_dir + '2'
    )
    resumed = train(resumed_cfg)
    assert resumed.iter == 4
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=1e-7)
    ema, ema_resumed = (weights(f'{c.work_dir}/compact_ema.pth') for c in (cfg, resumed_cfg))
    for name, value in ema.items():
        torch.testing.assert_close(ema_resumed[name], value, rtol=0, atol=1e-7)
    before = weights(checkpoint)[f'{UNITS[0]}.factors.1.weight']
    assert not torch.equal(before, whole.model.state_dict()[f'{UNITS[0]}.factors.1.weight'])


def test_expanded_checkpoint_says_what_it_is(seg_cfg):
    cfg = seg_cfg()
    train(cfg)
    meta = load_checkpoint(f'{cfg.work_dir}/iter_4.pth')['meta'][META_KEY]
    assert meta['kind'] == 'expanded'
    assert meta['layers'][UNITS[0]]['rate'] == 2


def test_load_from_a_compact_checkpoint(seg_cfg):
    cfg = seg_cfg()
    train(cfg)
    compact = f'{cfg.work_dir}/compact_last.pth'
    changes = {'load_from': compact, 'train_cfg.max_iters': 0, 'custom_hooks': hooks(EMA)}
    runner = train(seg_cfg(**changes, work_dir=cfg.work_dir + '2'))
    for name, value in mmexpand.contract(runner.model).state_dict().items():
        torch.testing.assert_close(value, weights(compact)[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(CheckpointError, match=r'rate 0\.5.*raise the rate'):
        train(seg_cfg(load_from=compact, custom_hooks=hooks(rate=0.5), work_dir=cfg.work_dir + '3'))


@pytest.mark.parametrize(
    ('checkpoint', 'changes', 'words'),
    [
        ('compact_last.pth', dict(resume=True), 'cannot be resumed'),
        ('iter_4.pth', dict(resume=True, custom_hooks=[dict(type='ContractHook')]), 'ExpandHook'),
        ('iter_4.pth', dict(resume=True, custom_hooks=hooks(rate=3)), 'method, rate and include'),
    ],
)
def test_the_wrong_kind_is_refused(seg_cfg, checkpoint, changes, words):
    cfg = seg_cfg()
    train(cfg)
    path = f'{cfg.work_dir}/{checkpoint}'
    with pytest.raises(CheckpointError, match=words):
        train(seg_cfg(load_from=path, work_dir=cfg.work_dir + '2', **changes))


@pytest.mark.parametrize('how', [dict(rate=3), dict(method='orepa')], ids=str)
def test_an_expanded_checkpoint_starts_one_of_another_rate_or_block(seg_cfg, how):
    cfg = seg_cfg()
    expected = mmexpand.contract(train(cfg).model).state_dict()
    runner = train(
        seg_cfg(
            **{
                'load_from': f'{cfg.work_dir}/iter_4.pth',
                'custom_hooks': hooks(**how),
                'train_cfg.max_iters': 0,
            },
            work_dir=cfg.work_dir + '2',
        )
    )
    for name, value in mmexpand.contract(runner.model).state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_stock_loads_an_expanded_checkpoint_as_the_compact_network(seg_cfg):
    """By the APIs that know no hooks: with the expanded config, and as Pretrained weights."""
    cfg = seg_cfg(custom_hooks=hooks(EMA))
    runner = train(cfg)
    path = f'{cfg.work_dir}/iter_4.pth'
    saved = load_checkpoint(path)['state_dict']
    ema = next(hook for hook in runner.hooks if isinstance(hook, EMAHook))
    expected = mmexpand.contract(ema.ema_model.module).state_dict()
    config = Path(cfg.work_dir) / 'expanded_config.py'
    cfg.dump(config)
    loaded = init_model(str(config), path, device='cpu').state_dict()
    pretrained = dict(type='Pretrained', checkpoint=path, prefix='backbone.')
    backbone = MODELS.build(dict(cfg.model.backbone, init_cfg=pretrained, _scope_='mmseg'))
    backbone.init_weights()
    for name in UNITS:
        key = f'{name}.weight'
        assert key in saved
        torch.testing.assert_close(loaded[key], expected[key], rtol=1e-5, atol=1e-7)
        inside = backbone.state_dict()[key.removeprefix('backbone.')]
        torch.testing.assert_close(inside, expected[key], rtol=1e-5, atol=1e-7)


def test_module_prefixes_and_other_classes_load_as_in_stock(seg_cfg, tmp_path):
    cfg = seg_cfg()
    runner = train(cfg)
    expected = mmexpand.contract(runner.model).state_dict()
    state = load_checkpoint(f'{cfg.work_dir}/iter_4.pth')['state_dict']
    prefixed = {f'module.{key}': value for key, value in state.items()}
    torch.save(dict(state_dict=prefixed, meta={}), tmp_path / 'prefixed.pth')
    changes = {
        'load_from': str(tmp_path / 'prefixed.pth'),
        'train_cfg.max_iters': 0,
        'custom_hooks': hooks(include=['backbone.encoder', 'decode_head.convs']),
        'model.backbone.base_channels': 4,
        'model.decode_head.channels': 6,
    }
    other = train(seg_cfg(**changes, work_dir=cfg.work_dir + '2')).model
    found = mmexpand.contract(other).state_dict()
    torch.testing.assert_close(
        found[f'{UNITS[0]}.weight'], expected[f'{UNITS[0]}.weight'], rtol=1e-4, atol=1e-6
    )
    assert found['decode_head.convs.0.conv.weight'].shape[0] == 6


def test_an_expanded_checkpoint_starts_a_compact_model(seg_cfg):
    cfg = seg_cfg()
    expanded = train(cfg).model
    runner = train(
        seg_cfg(
            **{
                'load_from': f'{cfg.work_dir}/iter_4.pth',
                'custom_hooks': [dict(type='ContractHook')],
                'train_cfg.max_iters': 0,
            },
            work_dir=cfg.work_dir + '2',
        )
    )
    for name, value in mmexpand.contract(expanded).state_dict().items():
        torch.testing.assert_close(runner.model.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_another_networks_checkpoint_is_refused(seg_cfg, tmp_path):
    runner = train(seg_cfg(**{'train_cfg.max_iters': 0}))
    weights = mmexpand.contract(runner.model).state_dict()
    del weights['decode_head.conv_seg.bias']
    with pytest.raises(CheckpointError, match=r'lacks 1 .* decode_head\.conv_seg\.bias'):
        match_checkpoint(runner.model, dict(state_dict=weights))


@pytest.mark.parametrize('build', [Runner.from_cfg, lambda cfg: build_runner(cfg, ('train',))])
@pytest.mark.parametrize('contract', [True, False])
def test_each_checkpoint_is_contracted_once(seg_cfg, monkeypatch, build, contract):
    """Also where EMAHook swaps the weights, which is before."""
    saved, ran = [], []

    def count(state_dict):
        saved.append(state_dict['backbone.encoder.0.0.convs.0.conv.factors.0.weight'].clone())
        return contract_state_dict(state_dict)

    class Look(Hook):
        def before_run(self, runner):
            ran.append([type(hook).__name__ for hook in runner.hooks])

    monkeypatch.setattr('mmexpand.mm.guard.contract_state_dict', count)
    cfg = seg_cfg(custom_hooks=hooks(EMA)[: 3 if contract else 2])
    cfg.default_hooks.checkpoint.interval = 1
    cfg.train_cfg.update(max_iters=2, val_interval=3)
    runner = build(cfg)
    runner.register_hook(Look(), priority='LOWEST')
    runner.train()
    assert len(saved) == 2
    for weight, step in zip(saved, (1, 2), strict=True):
        found = load_checkpoint(Path(cfg.work_dir) / f'iter_{step}.pth')
        assert torch.equal(weight, found['state_dict'][f'{UNITS[0]}.factors.0.weight'])
        assert found['meta'][META_KEY]['kind'] == 'expanded'
    # The first average is the weights themselves.
    assert not torch.equal(weight, found['ema_state_dict'][f'module.{UNITS[0]}.factors.0.weight'])
    # Hooks that are registered while hooks are called make none run twice.
    assert len(ran) == 1
    names = [type(hook).__name__ for hook in runner.hooks]
    assert names.count('LoadGuardHook') == names.count('SaveGuardHook') == 1
    assert names.index('LoadGuardHook') < names.index('EMAHook') < names.index('SaveGuardHook')


def test_builder_loads_pretrained_compact_weights(seg_cfg, tmp_path):
    cfg = seg_cfg()
    backbone = MODELS.build(dict(cfg.model.backbone, _scope_='mmseg'))
    torch.save(backbone.state_dict(), tmp_path / 'backbone.pth')
    pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'backbone.pth'))
    for init in ('default', 'preserve'):
        built = MODELS.build(
            dict(
                type='ExpandBackbone',
                method='cl',
                backbone=dict(cfg.model.backbone, init_cfg=pretrained),
                rate=2,
                init=init,
                _scope_='mmseg',
            )
        )
        built.init_weights()
        for name, value in mmexpand.contract(built).state_dict().items():
            torch.testing.assert_close(value, backbone.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_norms_in_branches_are_synchronised_by_mmdets_hook(seg_cfg):
    """SyncNormHook loads the statistics of norms and nothing else."""
    cfg = seg_cfg(custom_hooks=hooks(method='repvgg', forward='folded'))
    model = unwrap(train(cfg).model)
    states = {n: 2 * v for n, v in model.state_dict().items() if n.endswith('running_mean')}
    assert any('.repvgg.' in name for name in states)
    model.load_state_dict(states, strict=False)
    for name, value in states.items():
        assert torch.equal(model.state_dict()[name], value)
    name = next(name for name in states if '.repvgg.' in name)
    with pytest.raises(RuntimeError, match='factors of other shapes'):
        model.load_state_dict({name: states[name][:1]}, strict=False)


def test_averages_beside_the_weights_are_contracted_too(seg_cfg):
    """mmpretrain's EMAHook exchanges both whenever it finds them."""
    ema = dict(type='EMAHook', momentum=0.1)
    cfg = seg_cfg(custom_hooks=[ema, *hooks()])
    train(cfg)
    checkpoint = torch.load(f'{cfg.work_dir}/iter_4.pth', weights_only=False)
    assert any('factors' in key for key in checkpoint['ema_state_dict'])
    model = build_compact_model(cfg)
    match_checkpoint(model, checkpoint)
    averages = checkpoint['ema_state_dict']
    assert not any('factors' in key for key in averages)
    kept = {key.removeprefix('module.') for key in averages if key != 'steps'}
    assert kept == set(model.state_dict())


def test_blocks_of_former_versions_are_an_error(seg_cfg):
    model = build_compact_model(seg_cfg())
    expanded = copy.deepcopy(model)
    mmexpand.expand_(expanded, method='cl', include='backbone.encoder', rate=2)
    layers = {name: dict(method='cl_relu') for name in describe_units(expanded)}
    meta = dict(mmexpand=dict(kind='expanded', layers=layers))
    with pytest.raises(CheckpointError, match="has the block 'cl_relu', which is unknown"):
        match_checkpoint(model, dict(state_dict=expanded.state_dict(), meta=meta))
    # A compact checkpoint requires no block.
    match_checkpoint(model, dict(state_dict=model.state_dict(), meta=meta))
