"""Expansion of a module that has just been built."""

from collections.abc import Callable
from dataclasses import replace
from types import MethodType

from torch import nn

from ..surgery import ExpandConfig, Plan, expand_, is_expanded, named_units
from ..surgery.plan import make_plan
from .checkpoints import DISTILL_LOSSES
from .given import given_layers
from .logs import log


def expand_built(
    module: nn.Module, cfg: ExpandConfig, build: Callable[[], nn.Module] | None = None
) -> Plan:
    """Expand a module that has just been built, before its ``init_weights`` was called.

    'preserve' requires initialised weights, so that ``init_weights`` is called first and skipped
    when the Runner calls it. (mmengine's own ``init_weights`` does nothing a second time, but a
    network's class may extend it by code that would write to the factors.)

    Args:
        module: a module of any class.
        cfg: the options.
        build: builds the module again, for 'auto'; None makes 'auto' the same as 'preserve'.
    """
    given, initialised = None, _is_initialised(module)
    if cfg.init == 'auto' and build is not None and not initialised:
        given = given_layers(module, build)
    # True if the Runner's own call of init_weights will initialise the factors.
    initialise = cfg.init == 'default' or given is not None
    if not initialise and not initialised and hasattr(module, 'init_weights'):
        module.init_weights()
        # A bound method, so that a copy of the module gets a method of its own.
        module.init_weights = MethodType(_init_no_more, module)
    planned = make_plan(module, cfg, given)
    if any(layer.name.startswith(f'{DISTILL_LOSSES}.') for layer in planned):
        # They are not part of the network.
        cfg = replace(cfg, exclude=(*(cfg.exclude or ()), DISTILL_LOSSES))
        planned = make_plan(module, cfg, given)
    if planned:
        more = planned.params_after - planned.params_before
        # 4 bytes for a float32 weight, 12 with its gradient and momentum.
        log(
            f'Expanding {len(planned)} layers: {more:,} more parameters ({4 * more / 1e6:,.1f} MB; '
            f'about {12 * more / 1e6:,.1f} MB with gradients and momentum while training)\n'
            f'{planned}'
        )
    preserved = {
        layer.name: module.get_submodule(layer.name)
        for layer in planned
        if layer.init == 'preserve'
    }
    expand_(module, planned)
    for name, unit in named_units(module).items():
        if unit.given is None:
            layer = preserved.get(name)
            unit.given = [] if layer is None else [(layer.weight, layer.bias)]
    if initialise:
        # Some networks write to a layer's weight in init_weights: units must have one.
        for unit in named_units(module).values():
            unit.offer_weight()
    return planned


def _init_no_more(module: nn.Module) -> None:
    """Skip one call of ``init_weights``, the Runner's, and restore the class's own method."""
    del module.init_weights


def _is_initialised(module: nn.Module) -> bool:
    if 'init_weights' in vars(module):
        return True
    # Only mmengine's modules have is_init; others were initialised by an earlier expansion.
    return getattr(module, 'is_init', is_expanded(module))
