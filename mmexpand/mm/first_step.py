"""Checks in the first training steps for faults that would otherwise go unnoticed."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..core.expanded_layer import ExpandedLayer
from ..core.expression import has_statistics
from ..errors import UserRuntimeError, UserValueError
from ..surgery import named_units
from .checkpoints import put_in_front, unwrap
from .logs import log
from .optim import single_wrappers
from .start import StartHook


class FirstStepHook(Hook):
    """A hook that checks the first training steps of an expanded model.

    It raises an error if a norm in a branch gets one value per channel, or if the optimizer does
    not train the factors. It warns of norms in eval mode with initial statistics, and of layers
    with norms that run several times in a step.
    """

    priority = 'LOWEST'

    def __init__(self):
        self._step = ExitStack()
        self._optimizers: SteppedOptimizers | None = None
        self._left: dict[str, Tensor] = {}
        self._calls: Counter | None = None

    def before_train(self, runner: Runner) -> None:
        """Start the checks."""
        self._optimizers = SteppedOptimizers()
        # A compiled model must not change after the first iteration.
        if not runner.cfg.get('compile'):
            guard_norms(unwrap(runner.model))
            self._calls = Counter()

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Check the norms, and count the calls of layers in this iteration."""
        if self._calls is None:
            return
        model = unwrap(runner.model)
        _warn_of_idle_norms(model)
        self._step.enter_context(count_calls(model, self._calls))

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Warn of repeated layers, and check that the optimizer trains the factors.

        Raises:
            RuntimeError: if the optimizer steps other parameters than the factors.
        """
        self._step.close()
        if self._calls is not None:
            _warn_of_repeated(unwrap(runner.model), self._calls)
            self._calls = None
        if not self._optimizers.all:
            return
        units = named_units(unwrap(runner.model))
        if self._left:
            self._optimizers.stop()
            _check_moved(runner, units, self._left)
            return
        # An optimizer that steps copies of the parameters may write them back later.
        self._left = {
            name: parameter.detach().clone()
            for name, parameter in not_held(units, runner.optim_wrapper, self._optimizers).items()
        }
        self._optimizers.forget()
        if not self._left:
            self._optimizers.stop()

    def after_train(self, runner: Runner) -> None:
        """Stop the checks."""
        self._optimizers.stop()


def watch_first_steps(runner: Runner) -> None:
    """Add the checks of the first training steps to a Runner, unless it has them."""
    if not any(isinstance(hook, FirstStepHook) for hook in runner.hooks):
        runner.register_hook(FirstStepHook(), priority='LOWEST')
        # Before DistillHook, whose hooks on the model would be copied with it.
        put_in_front(runner, StartHook())


class SteppedOptimizers:
    """The optimizers of this process that have stepped.

    Attributes:
        all: all optimizers that have stepped.
        last: optimizers that have not called another optimizer's step.
    """

    def __init__(self):
        # Weak references, since nobody stops the checks if a training fails.
        self.all: WeakSet[Optimizer] = WeakSet()
        self.last: WeakSet[Optimizer] = WeakSet()
        self._running: list[bool] = []
        self._handles = [
            register_optimizer_step_pre_hook(self._begin),
            register_optimizer_step_post_hook(self._end),
        ]

    def _begin(self, *_: object) -> None:
        self._running = [False for _ in self._running]
        self._running.append(True)

    def _end(self, optimizer: Optimizer, *_: object) -> None:
        self.all.add(optimizer)
        if self._running.pop():
            self.last.add(optimizer)

    def forget(self) -> None:
        """Forget the steps so far."""
        self.all.clear()
        self.last.clear()

    def stop(self) -> None:
        """Stop watching, and forget the steps so far."""
        for handle in self._handles:
            handle.remove()
        self.forget()


def not_held(
    units: Mapping[str, ExpandedLayer],
    optim_wrapper: OptimWrapper | OptimWrapperDict,
    stepped: SteppedOptimizers,
) -> dict[str, nn.Parameter]:
    """Return the trainable factors that no stepped optimizer holds on any rank.

    Args:
        units: units by name.
        optim_wrapper: the wrapper whose groups hold the trainable parameters.
        stepped: the optimizers of the first step.
    """
    wrappers = single_wrappers(optim_wrapper)
    seen = {id(optimizer) for optimizer in stepped.all}
    groups = [g for w in wrappers if id(w.optimizer) in seen for g in w.optimizer.param_groups]
    wanted = {id(p) for group in groups if group.get('lr', 1) for p in group['params']}
    held = {id(p) for o in stepped.last for group in o.param_groups for p in group['params']}
    factors = {
        name: parameter
        for name, parameter in _factors(units).items()
        if parameter.requires_grad and id(parameter) in wanted
    }
    # Each rank may have a part of the optimizer's parameters.
    missing = [name for name, parameter in factors.items() if id(parameter) not in held]
    everywhere = set.intersection(*map(set, all_gather_object(missing)))
    return {name: factors[name] for name in missing if name in everywhere}


def _factors(units: Mapping[str, ExpandedLayer]) -> dict[str, nn.Parameter]:
    return {
        f'{name}.{key}': parameter
        for name, unit in units.items()
        for key, parameter in unit.named_parameters()
    }


def _check_moved(
    runner: Runner, units: Mapping[str, ExpandedLayer], before: Mapping[str, Tensor]
) -> None:
    factors = _factors(units)
    idle = [name for name, value in before.items() if torch.equal(factors[name], value)]
    if len(idle) == len(before):
        optimizer = getattr(runner.optim_wrapper, 'optimizer', runner.optim_wrapper)
        raise UserRuntimeError(
            f'{len(idle)} factors of expanded layers, {idle[0]} first, are not trained: '
            f'{type(optimizer).__name__} steps parameters outside its groups; use another '
            "optimizer, or model=dict(type='ExpandModel', ...) instead of ExpandHook"
        )


def _norms(unit: nn.Module) -> list[_BatchNorm]:
    return [module for module in unit.modules() if isinstance(module, _BatchNorm)]


def _units_with_norms(model: nn.Module) -> Iterator[tuple[str, ExpandedLayer]]:
    for name, unit in named_units(model).items():
        if _norms(unit):
            yield name, unit


def guard_norms(model: nn.Module) -> None:
    """Make norms in branches raise ValueError for a batch with one value per channel."""
    for name, unit in _units_with_norms(model):
        for norm in _norms(unit):
            if not isinstance(norm, nn.SyncBatchNorm):
                norm.register_forward_pre_hook(partial(_check_values, name, unit.method))


def _check_values(name: str, method: str, norm: nn.Module, args: tuple) -> None:
    (x,) = args
    if norm.training and x.numel() == x.shape[1]:
        raise UserValueError(_one_value(name, method))


def _one_value(name: str, method: str) -> str:
    return (
        f'{name}: the norms in its branches (method {method!r}) get one value per channel, a batch '
        'of 1 on a map of 1x1, which has no variance: use a batch of at least 2 (and '
        f'drop_last=True), or skip the layer with exclude={name!r} of ExpandHook'
    )


@contextmanager
def count_calls(model: nn.Module, calls: Counter) -> Iterator[None]:
    """Count, in this context, how often layers with norms run in one forward pass of a model.

    Calls outside a forward pass, as of activation checkpointing in the backward pass, are ignored.

    Args:
        model: the model, without a wrapper.
        calls: changed in place: the largest count in one forward pass, by layer name.
    """
    present: Counter = Counter()
    running: list[bool] = []

    def begin(*_: object) -> None:
        present.clear()
        running.append(True)

    def end(*_: object) -> None:
        running.clear()
        calls.update({name: count - calls[name] for name, count in (present - calls).items()})

    def count(name: str, unit: ExpandedLayer, args: tuple, output: Tensor) -> None:
        present[name] += bool(running)
        # A kernel that is folded by the batch's statistics calls no norm, so check here.
        if output.dim() == 4 and output.numel() == output.shape[1] and _measures(unit):
            raise UserValueError(_one_value(name, unit.method))

    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(begin))
        hooks.enter_context(model.register_forward_hook(end))
        for name, unit in _units_with_norms(model):
            hooks.enter_context(unit.register_forward_hook(partial(count, name)))
        yield


def _measures(unit: nn.Module) -> bool:
    norms = [norm for norm in _norms(unit) if not isinstance(norm, nn.SyncBatchNorm)]
    return unit.training and any(norm.training for norm in norms)


def _warn_of_repeated(model: nn.Module, calls: Mapping[str, int]) -> None:
    repeated = {name: count for name, count in calls.items() if count > 1}
    if repeated:
        name = next(iter(repeated))
        method = named_units(model)[name].method
        log(
            f'{len(repeated)} expanded layers with norms in their branches run several times in a '
            f'training step, {name} ({method}, {repeated[name]} times) first: their statistics mix '
            'the inputs of all calls, so that prediction differs from training. Skip them with '
            f"exclude={sorted(repeated)} of ExpandHook, or use a block without norms, such as 'cl'",
            logging.WARNING,
        )


def _warn_of_idle_norms(model: nn.Module) -> None:
    idle = [
        name
        for name, unit in _units_with_norms(model)
        if any(p.requires_grad for p in unit.parameters()) and any(map(_is_idle, _norms(unit)))
    ]
    if idle:
        log(
            f'{len(idle)} expanded layers are trained with norms in eval mode with initial '
            f'statistics (mean 0, variance 1), {idle[0]} first: nothing is normalised. Set '
            "norm_eval=False (mmdet's ResNet has True), skip them with exclude=[...] of "
            "ExpandHook, or use a block without norms, such as 'cl'",
            logging.WARNING,
        )


def _is_idle(norm: _BatchNorm) -> bool:
    if norm.training or norm.running_mean is None:
        return False
    return not has_statistics(dict(norm.named_buffers()), '')
