"""Optimizers that hold others: built on the factors, refused, or found out in the first steps."""

import pytest
import torch
import torch.distributed as dist
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIMIZERS
from torch import nn

from mmexpand.mm import optimizer_check
from mmexpand.mm.wrapped_optimizers import check_given, keeps_own_groups
from mmexpand.surgery import named_units
from tests.runs import train

SGD = dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=0.01)
PARAMWISE = dict(
    custom_keys={'encoder.0': dict(lr_mult=0.5)}, norm_decay_mult=0.0, factor_decay='product'
)


@pytest.fixture
def process_group():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def with_optimizer(cfg, **optimizer):
    cfg.optim_wrapper = dict(optimizer=optimizer, paramwise_cfg=PARAMWISE)
    return cfg


@OPTIMIZERS.register_module()
class Holds(torch.optim.SGD):
    """Steps by another optimizer, which is built with it."""

    def __init__(self, params, **kwargs):
        params = list(params)
        super().__init__(params, **kwargs)
        self.inner = torch.optim.SGD([dict(group) for group in params], **kwargs)

    def step(self, closure=None):
        for ours, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            theirs['lr'] = ours['lr']
        return self.inner.step(closure)


WRAPPED = {
    'zero': dict(SGD, type='ZeroRedundancyOptimizer', optimizer_type='SGD'),
    'other': dict(SGD, type='Holds'),
}


@pytest.mark.parametrize('wrapped', WRAPPED)
def test_a_wrapped_optimizer_trains_the_factors(seg_cfg, process_group, wrapped):
    """Bit for bit as the optimizer that it holds, with options and schedule."""
    expected = train(with_optimizer(seg_cfg(), **SGD))
    start = train(with_optimizer(seg_cfg(**{'train_cfg.max_iters': 0}), **SGD))
    found = train(with_optimizer(seg_cfg(), **WRAPPED[wrapped]))
    before = dict(start.model.named_parameters())
    trained = [name for name, p in expected.model.named_parameters() if p.requires_grad]
    for name, parameter in found.model.named_parameters():
        assert torch.equal(parameter, expected.model.get_parameter(name)), name
        assert torch.equal(parameter, before[name]) == (name not in trained), name


@OPTIMIZERS.register_module()
class Hides(torch.optim.SGD):
    """Steps the parameters that it was built with by what nobody finds."""

    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)
        self.hidden = [torch.optim.SGD([p for g in self.param_groups for p in g['params']], lr=0.1)]

    def step(self, closure=None):
        self.hidden[0].step()


@OPTIMIZERS.register_module()
class StepsCopies(torch.optim.SGD):
    """Steps copies, as optimizers with weights in full precision do, and writes them back."""

    def step(self, closure=None):
        for group in self.param_groups:
            held = [p for p in group['params'] if p.grad is not None]
            copies = [nn.Parameter(p.detach().clone()) for p in held]
            for copy, parameter in zip(copies, held, strict=True):
                copy.grad = parameter.grad
            torch.optim.SGD(copies, lr=group['lr']).step()
            for copy, parameter in zip(copies, held, strict=True):
                parameter.data.copy_(copy)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_what_trains_no_factor_is_found_out(seg_cfg, accumulate):
    cfg = seg_cfg(**{'train_cfg.max_iters': 6})
    cfg.optim_wrapper = dict(optimizer=dict(SGD, type='Hides'), accumulative_counts=accumulate)
    words = r'factors of expanded layers, backbone\.enc\S+ first, are not trained: Hides steps'
    with pytest.raises(RuntimeError, match=words):
        train(cfg)


def test_what_steps_copies_is_not_refused(seg_cfg):
    cfg = seg_cfg()
    cfg.optim_wrapper = dict(optimizer=dict(type='StepsCopies', lr=0.05))
    assert train(cfg).iter == 4


def test_a_factor_that_another_rank_steps_is_held(seg_cfg, monkeypatch):
    runner = train(seg_cfg())
    units = named_units(runner.model)
    stepped = optimizer_check.SteppedOptimizers()
    names = [f'{name}.{key}' for name, unit in units.items() for key, _ in unit.named_parameters()]
    held = torch.optim.SGD([runner.model.get_parameter(name) for name in names[:2]], lr=0.1)
    stepped.all.update([runner.optim_wrapper.optimizer, held])
    stepped.last.add(held)
    assert list(optimizer_check.not_held(units, runner.optim_wrapper, stepped)) == names[2:]
    monkeypatch.setattr(optimizer_check, 'all_gather_object', lambda own: [own, names[:4]])
    assert list(optimizer_check.not_held(units, runner.optim_wrapper, stepped)) == names[2:4]
    stepped.stop()


def test_an_object_that_holds_another_is_refused():
    parameters = list(nn.Linear(2, 2).parameters())
    plain, holds = torch.optim.SGD(parameters, lr=0.1), Holds([dict(params=parameters)], lr=0.1)
    assert [keeps_own_groups(one) for one in (plain, holds)] == [False, True]
    check_given(OptimWrapper(plain).optimizer)
    with pytest.raises(ValueError, match=r"Holds wraps an optimizer.*optimizer=dict\(type='Holds'"):
        check_given(holds)
    # Where the groups are shared, what is exchanged in one is exchanged in the other.
    holds.inner.param_groups = holds.param_groups
    check_given(holds)
