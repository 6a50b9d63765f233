"""Checks of norms in branches in the first training iteration."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.expanded_layer import ExpandedLayer
from ..core.expression import has_statistics
from ..errors import UserValueError
from ..surgery import named_units
from .checkpoints import unwrap
from .logs import log


class NormCheckHook(Hook):
    """A hook that checks norms in branches in the first training iteration.

    It raises an error if a norm gets one value per channel. It warns of norms in eval mode with
    initial statistics, and of layers with norms that run several times in a step.
    """

    priority = 'LOWEST'

    def __init__(self):
        self._step = ExitStack()
        self._calls: Counter | None = None

    def before_train(self, runner: Runner) -> None:
        """Start the checks."""
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
        """Warn of repeated layers."""
        self._step.close()
        if self._calls is not None:
            _warn_of_repeated(unwrap(runner.model), self._calls)
            self._calls = None


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
        calls.update(present - calls)

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
