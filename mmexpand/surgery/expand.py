"""Expansion and contraction: replacing layers of a model by units, and units by layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from ..core.expanded_layer import ExpandedLayer
from ..core.units import ExpandedConv2d, ExpandedConvTranspose2d, ExpandedLinear
from ..errors import UserValueError
from .compat import carry_over_hooks, put_module
from .config import ExpandConfig, takes_options
from .copying import copy_model
from .plan import Plan, plan
from .references import replace_references


@takes_options
def expand_(model: nn.Module, cfg: ExpandConfig | Plan | None = None, **options: object) -> Plan:
    """Expand a model in place.

    All checks run before the first change. If all chosen layers are expanded already, the model
    does not change.

    Args:
        model: any model; build its optimizer afterwards.
        cfg: the options in one object, instead of by name; or a plan of ``plan``, from which
            layers may have been removed.
        **options: see ``ExpandConfig``.

    Returns:
        The executed plan; empty if all chosen layers were expanded already.

    Raises:
        TypeError, ValueError: see ``plan``; also if the model is a single layer, or the plan does
            not fit it.
    """
    done = (
        _check_plan(model, cfg, options) if isinstance(cfg, Plan) else plan(model, cfg, **options)
    )
    if any(not layer.name for layer in done):
        raise UserValueError(
            f'cannot replace {type(model).__name__}, which is a single layer and not part of a '
            'model; make a unit of it with from_conv of ExpandedConv2d or ExpandedConvTranspose2d, '
            'or ExpandedLinear.from_linear'
        )
    replaced = {}
    for layer in done:
        old = model.get_submodule(layer.name)
        replaced[old] = _expand_layer(old, done.config, layer.init)
    for layer, unit in zip(done, replaced.values(), strict=True):
        _replace(model, layer.names, unit)
    replace_references(model, replaced)
    return done


def _check_plan(model: nn.Module, given: Plan, options: dict) -> Plan:
    """Raise ValueError if a plan was made for another model, or was changed."""
    # Except a layer's start, which may be chosen in the plan.
    possible = plan(model, replace(given.config, init='default'), **options).layers
    for layer in given:
        if replace(layer, init='default') not in possible:
            raise UserValueError(
                f'the plan does not fit {type(model).__name__}: {layer.name} cannot be expanded as '
                f'planned ({layer}); make the plan again with mmexpand.plan'
            )
    return given


def _expand_layer(layer: nn.Module, cfg: ExpandConfig, init: str) -> ExpandedLayer:
    how = dict(
        rate=cfg.rate,
        method=cfg.method,
        init=init,
        forward=cfg.forward,
        **cfg.options.chosen,
    )
    if isinstance(layer, nn.Linear):
        return ExpandedLinear.from_linear(layer, **how)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    unit = ExpandedConvTranspose2d if transposed else ExpandedConv2d
    return unit.from_conv(layer, **how)


def contract_(model: nn.Module) -> nn.Module:
    """Contract a model in place: replace each unit by its original layer with the folded kernel.

    Layer types, names and state-dict keys become those of the compact model. A model without
    units does not change.

    Returns:
        The model; if it is a unit itself, the contracted layer.
    """
    if isinstance(model, ExpandedLayer):
        return _contract_unit(model)
    names = names_of_units(model)
    replaced = {unit: _contract_unit(unit) for unit in names}
    for unit, aliases in names.items():
        _replace(model, aliases, replaced[unit])
    replace_references(model, replaced)
    return model


def contract(model: nn.Module) -> nn.Module:
    """Return a compact copy of a model, which is not changed."""
    return contract_(copy_model(model))


@contextmanager
def compact_looks(model: nn.Module) -> Iterator[None]:
    """Give a model the names, types and shapes of the compact model's layers in this context.

    The layers' parameters have no values. After the context the units are back.
    """
    units = names_of_units(model)
    try:
        for unit, aliases in units.items():
            _replace(model, aliases, unit.stand_in())
        yield
    finally:
        for unit, aliases in units.items():
            _put(model, aliases, unit)


def is_expanded(model: nn.Module) -> bool:
    """Return whether a model has a unit."""
    return any(isinstance(module, ExpandedLayer) for module in model.modules())


def named_units(model: nn.Module) -> dict[str, ExpandedLayer]:
    """Return the units of a model by their (first) names."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, ExpandedLayer)
    }


def names_of_units(model: nn.Module) -> dict[ExpandedLayer, list[str]]:
    """Return all names of each unit of a model; a shared unit has several."""
    names: dict[ExpandedLayer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ExpandedLayer):
            names.setdefault(module, []).append(name)
    return names


def _contract_unit(unit: ExpandedLayer) -> nn.Module:
    return unit.to_linear() if isinstance(unit, ExpandedLinear) else unit.to_conv()


def _replace(model: nn.Module, names: tuple[str, ...] | list[str], new: nn.Module) -> None:
    carry_over_hooks(model.get_submodule(names[0]), new)
    _put(model, names, new)


def _put(model: nn.Module, names: tuple[str, ...] | list[str], new: nn.Module) -> None:
    for name in names:
        parent, _, attribute = name.rpartition('.')
        put_module(model.get_submodule(parent), attribute, new)
