"""A compact training that goes on expanded goes on where it was."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn

import mmexpand
from mmexpand import ExpandConfig
from mmexpand.mm import warm_start
from mmexpand.mm.optim import by_layer
from mmexpand.mm.warm_start import CompactOptimizer
from mmexpand.surgery import named_units
from mmexpand.surgery.checkpoint import CheckpointError, load_checkpoint
from tests.runs import distances, train, words_of


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2)

    def forward(self, x):
        return self.up(self.conv2(self.norm(self.conv1(x)).relu()))


def steps(model, optimizer, count, generator):
    for _ in range(count):
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        (model(x) - x[:, :1]).square().mean().backward()
        optimizer.step()


def sgd(**paramwise):
    optimizer = dict(type='SGD', lr=0.05, momentum=0.9)
    return dict(type='OptimWrapper', optimizer=optimizer, paramwise_cfg=paramwise)


def checkpoint_of(model, optimizer):
    return copy.deepcopy(dict(state_dict=model.state_dict(), optimizer=optimizer.state_dict()))


def carry_over(kept, expanded, wrapper, cfg):
    cfg = SimpleNamespace(optim_wrapper=Config(dict(o=cfg)).o)
    kept.carry_over(SimpleNamespace(model=expanded, optim_wrapper=wrapper, cfg=cfg))


@pytest.mark.parametrize('lost', [False, True])
def test_the_kernel_goes_on_as_the_compact_one_would(lost):
    """To 1e-10 over 50 steps, the outer factors held; without the momentum it does not."""
    torch.manual_seed(0)
    compact, generator = Net().double(), torch.Generator().manual_seed(1)
    optimizer = build_optim_wrapper(compact, sgd()).optimizer
    steps(compact, optimizer, 10, generator)
    checkpoint = checkpoint_of(compact, optimizer)
    expanded = Net().double()
    mmexpand.expand_(expanded, ExpandConfig(method='cl', init='preserve'))
    cfg = by_layer(sgd(outer_lr_mult=0.0))
    wrapper = build_optim_wrapper(expanded, cfg)
    kept = CompactOptimizer(expanded, checkpoint)
    if not lost:
        carry_over(kept, expanded, wrapper, cfg)
    again = torch.Generator()
    again.set_state(generator.get_state())
    steps(compact, optimizer, 50, generator)
    steps(expanded, wrapper.optimizer, 50, again)
    errors = [
        (getattr(unit, kind) - getattr(compact.get_submodule(name), kind)).abs().max().item()
        for name, unit in named_units(expanded).items()
        for kind in ('weight', 'bias')
    ]
    assert max(errors) > 1e-4 if lost else max(errors) < 1e-10


@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
def test_the_log_says_what_is_carried_over(optimizer, monkeypatch):
    said = []
    monkeypatch.setattr(warm_start, 'log', lambda message, level=0: said.append(message))
    more = dict(momentum=0.9) if optimizer == 'SGD' else {}
    cfg = by_layer(dict(type='OptimWrapper', optimizer=dict(type=optimizer, lr=0.01, **more)))
    compact, expanded = Net().double(), Net().double()
    trained = build_optim_wrapper(compact, cfg).optimizer
    steps(compact, trained, 2, torch.Generator().manual_seed(1))
    mmexpand.expand_(expanded, ExpandConfig(method='cl', init='preserve'))
    wrapper = build_optim_wrapper(expanded, cfg)
    kept = CompactOptimizer(expanded, checkpoint_of(compact, trained))
    carry_over(kept, expanded, wrapper, cfg)
    state = wrapper.optimizer.state
    assert state[expanded.norm.weight]  # What is not expanded goes on with any optimizer.
    factors = list(expanded.conv1.expression.parameters())
    if optimizer == 'SGD':
        assert all(p in state for p in factors) and 'with its momentum' in said[-1]
    else:
        assert not any(p in state for p in factors) and 'AdamW starts without' in said[-1]


KERNEL = 'backbone.encoder.0.0.convs.0.conv.weight'


def hook(method='cl', **options):
    how = dict(include='backbone.encoder', init='preserve', method=method)
    return dict(type='ExpandHook', **how, **options)


@pytest.fixture(params=[[], [dict(type='EMAHook')]], ids=['', 'EMAHook'])
def compact_run(seg_cfg, request):
    """The config and checkpoint, at its middle, of a compact training."""
    cfg = seg_cfg(custom_hooks=request.param, **{'train_cfg.max_iters': 8})
    train(cfg)
    return cfg, Path(cfg.work_dir) / 'iter_4.pth'


def trained(path):
    """The weights that are trained, which EMAHook saves as the average."""
    checkpoint = load_checkpoint(path)
    averaged = checkpoint.get('ema_state_dict', {})
    inside = {k.removeprefix('module.'): v for k, v in averaged.items() if k != 'steps'}
    return {**checkpoint['state_dict'], **inside}


def resumed(cfg, checkpoint, work_dir, custom_hooks):
    """Another training with the schedule of this one, from its checkpoint."""
    cfg = copy.deepcopy(cfg)
    cfg.merge_from_dict(dict(work_dir=work_dir, resume=True, load_from=str(checkpoint)))
    cfg.custom_hooks = [*custom_hooks, *cfg.custom_hooks]
    cfg.experiment_name = Path(work_dir).name
    return cfg


def test_a_resumed_training_goes_on_expanded(compact_run, tmp_path):
    cfg, checkpoint = compact_run
    hooks = [hook(warm_start=True), dict(type='ContractHook')]
    again = resumed(cfg, checkpoint, str(tmp_path / 'expanded'), hooks)
    again.optim_wrapper.paramwise_cfg = dict(outer_lr_mult=0.0)
    again.optim_wrapper.constructor = 'ExpandOptimWrapperConstructor'
    runner = train(again)
    assert runner.iter == 8
    end = load_checkpoint(tmp_path / 'expanded/compact_last.pth')['state_dict']
    expected, start = trained(Path(cfg.work_dir) / 'iter_8.pth'), trained(checkpoint)
    assert list(end) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(end[name], value, rtol=1e-3, atol=1e-4, msg=name)
    moved = (expected[KERNEL] - start[KERNEL]).abs().max()
    assert (end[KERNEL] - expected[KERNEL]).abs().max() < 0.01 * moved
    # What it has written is resumed as any expanded checkpoint.
    again.merge_from_dict({'load_from': None, 'train_cfg.max_iters': 10})
    again.experiment_name = 'further'
    assert train(again).iter == 10


def test_the_best_may_stay_the_compact_networks(seg_cfg, tmp_path):
    cfg = seg_cfg(custom_hooks=[], **{'train_cfg.max_iters': 8, 'train_cfg.val_interval': 4})
    cfg.default_hooks.checkpoint.save_best = 'mIoU'
    train(cfg)
    checkpoint = Path(cfg.work_dir) / 'iter_8.pth'
    # It has a score that nothing beats.
    saved = torch.load(checkpoint, weights_only=False)
    saved['message_hub']['runtime_info']['best_score'] = 100.0
    torch.save(saved, checkpoint)
    best = saved['message_hub']['runtime_info']['best_ckpt']
    hooks = [hook(warm_start=True), dict(type='ContractHook')]
    again = resumed(cfg, checkpoint, str(tmp_path / 'expanded'), hooks)
    again.train_cfg.max_iters = 12
    train(again)
    found = load_checkpoint(tmp_path / 'expanded/compact_best.pth')['state_dict']
    for name, value in load_checkpoint(best)['state_dict'].items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    last = load_checkpoint(tmp_path / 'expanded/compact_last.pth')['state_dict']
    assert not torch.allclose(last[KERNEL], found[KERNEL], rtol=1e-4, atol=1e-5)


def test_without_the_option_it_is_refused_and_named(compact_run, tmp_path):
    cfg, checkpoint = compact_run
    with pytest.raises(CheckpointError, match='warm_start=True'):
        train(resumed(cfg, checkpoint, str(tmp_path / 'expanded'), [hook()]))


def test_blocks_with_norms_go_on_from_the_compact_weights(compact_run, tmp_path):
    cfg, checkpoint = compact_run
    normed = dict(hook(warm_start=True), method='repvgg', init='default')
    again = resumed(cfg, checkpoint, str(tmp_path / 'expanded'), [normed])
    again.optim_wrapper.optimizer.lr = 0.0
    runner = train(again)
    words = words_of(runner)
    assert words.startswith('3 of 3 expanded layers start from given weights; on the first batch')
    assert max(distances(words)) < 1e-4
    unit = next(iter(named_units(runner.model).values()))
    assert not torch.equal(unit._norms[0].norm.running_mean, torch.zeros(()))
    given = load_checkpoint(checkpoint)['state_dict'][KERNEL]
    error = (unit.to_conv().weight - given).abs().max() / given.abs().max()
    assert 0 < error < 0.3  # The statistics of few images move.


def test_states_of_another_optimizer_and_other_groups():
    torch.manual_seed(0)
    compact = Net()
    wrapper = build_optim_wrapper(compact, sgd())
    steps(compact.double(), wrapper.optimizer, 2, torch.Generator().manual_seed(0))
    checkpoint = checkpoint_of(compact, wrapper.optimizer)
    expanded = copy.deepcopy(compact)
    mmexpand.expand_(expanded, method='cl', rate=2)
    kept = CompactOptimizer(expanded, copy.deepcopy(checkpoint))
    groups = sgd(custom_keys={'conv1': dict(lr_mult=0.1)})
    expanded_wrapper = build_optim_wrapper(expanded, by_layer(groups))
    with pytest.raises(CheckpointError, match='use the paramwise_cfg of that training'):
        carry_over(kept, expanded, expanded_wrapper, groups)
    adam = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01))
    kept = CompactOptimizer(expanded, checkpoint)
    expanded_wrapper = build_optim_wrapper(expanded, by_layer(adam))
    carry_over(kept, expanded, expanded_wrapper, adam)
    steps(expanded, expanded_wrapper.optimizer, 1, torch.Generator().manual_seed(0))
