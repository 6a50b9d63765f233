"""A check that the optimizer trains the factors."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..core.expanded_layer import ExpandedLayer
from ..errors import UserRuntimeError
from ..surgery import named_units
from .checkpoints import unwrap
from .optim import single_wrappers


class OptimizerCheckHook(Hook):
    """A hook that raises an error if the first steps do not train the factors."""

    priority = 'LOWEST'

    def __init__(self):
        self._optimizers: SteppedOptimizers | None = None
        self._left: dict[str, Tensor] = {}

    def before_train(self, runner: Runner) -> None:
        """Start the check."""
        self._optimizers = SteppedOptimizers()

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Check the optimizers that have stepped.

        Raises:
            RuntimeError: if the optimizer steps other parameters than the factors.
        """
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
        """Stop the check."""
        self._optimizers.stop()


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
