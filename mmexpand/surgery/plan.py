"""Plans: the layers of a model to expand, and the skipped layers with reasons."""

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from torch import nn

from ..core.blocks import build_expression, choose_block
from ..core.compat import ConvNd, parameters_of
from ..core.eligibility import EXPANDED_ALREADY, refusal
from ..core.expanded_layer import ExpandedLayer
from ..core.expression import factors_of
from ..core.layer_spec import LayerSpec
from ..core.names import near_matches
from ..core.units import ExpandedLinear
from ..errors import UserValueError
from .config import ExpandConfig, takes_options
from .layer_plan import LayerPlan, SkippedLayer
from .plan_table import describe_plan
from .references import referenced_parameters

ADDS_ITS_INPUT = ('with_res_shortcut', 'use_res_connect', 'add_identity')
"""Attributes that are True in blocks of mmdet, mmseg, mmpretrain and torchvision that add their
input to their output."""


@dataclass(frozen=True)
class Plan:
    """The layers to expand, over which a plan iterates, and the skipped layers.

    ``print(plan)`` prints a table.
    """

    config: ExpandConfig
    layers: list[LayerPlan] = field(default_factory=list)
    skipped: list[SkippedLayer] = field(default_factory=list)
    params_before: int = 0
    """Number of parameters of the whole model."""

    def __iter__(self):
        return iter(self.layers)

    def __str__(self) -> str:
        total = f'parameters of the model: {self.params_before:,} -> {self.params_after:,}'
        return f'{describe_plan([("", self.layers, self.skipped)])}\n{total}'

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def params_after(self) -> int:
        """Return the number of parameters of the whole model after expansion."""
        return self.params_before + sum(x.params_after - x.params_before for x in self.layers)


@takes_options
def plan(model: nn.Module, cfg: ExpandConfig | None = None, **options: object) -> Plan:
    """Return the plan of an expansion, without changing the model.

    Args:
        model: any model.
        cfg: the options in one object, instead of by name.
        **options: see ``ExpandConfig``.

    Returns:
        The plan: layers with their factor shapes, and skipped layers with a reason each.

    Raises:
        TypeError, ValueError: for options, see ``ExpandConfig``.
        ValueError: if a pattern matches no layer, if every layer is skipped (unless because it
            is expanded already), or if the rate makes it impossible to preserve a layer's weight.
    """
    return make_plan(model, ExpandConfig.given(cfg, options))


def make_plan(model: nn.Module, cfg: ExpandConfig, given: Set[str] | None = None) -> Plan:
    """Return the plan of an expansion, as ``plan`` does.

    Args:
        model: any model.
        cfg: the options.
        given: names of layers with given weights, for ``init='auto'``; None for all layers.
    """
    names = _layer_names(model)
    owners = Counter(
        id(parameter)
        for module in set(model.modules())
        for parameter in parameters_of(module).values()
        if parameter is not None
    )
    held = referenced_parameters(model)
    kinds = _kinds(model, names)
    chosen, excluded = _choose(kinds, cfg)
    result = Plan(cfg, params_before=_count(model))
    for layer, aliases in names.items():
        if chosen.isdisjoint(aliases):
            reason = 'not included' if excluded.isdisjoint(aliases) else 'excluded'
        else:
            reason = _refuse(layer, owners, held, cfg)
        if reason:
            result.skipped.append(SkippedLayer(aliases[0], reason))
        else:
            kept = cfg.init == 'auto' and (given is None or not given.isdisjoint(aliases))
            init = 'preserve' if kept or cfg.init == 'preserve' else 'default'
            result.layers.append(_plan_layer(layer, aliases, cfg, init))
    expanded_already = any(layer.reason == EXPANDED_ALREADY for layer in result.skipped)
    if not result.layers and not expanded_already:
        raise UserValueError(f'nothing to expand in {type(model).__name__}: {_why(result.skipped)}')
    return result


def _layer_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return convolutions, linear layers and similar layers of a model, with all their names."""
    names: dict[nn.Module, list[str]] = {}
    inside_units: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ExpandedLayer):
            inside_units.update(factors_of(module))
        if module not in inside_units and _is_layer(module):
            names.setdefault(module, []).append(name)
    return names


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, (nn.Linear, ConvNd, ExpandedLayer)):
        return True
    # Deformable and similar convolutions derive from nn.Module only: look for a name and a weight.
    looks_like_one = re.search('conv|linear', type(module).__name__, re.IGNORECASE)
    return bool(looks_like_one) and hasattr(module, 'weight')


def matches(name: str, pattern: str) -> bool:
    """Return whether a module name has a prefix, or matches a glob or regular expression."""
    if pattern.startswith('re:'):
        return re.search(pattern[3:], name) is not None
    if any(character in pattern for character in '*?['):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.startswith(pattern + '.')


def _kinds(model: nn.Module, names: dict[nn.Module, list[str]]) -> dict[str, set[str]]:
    """Return the kinds of each layer that patterns can name, by layer; see ``ExpandConfig``."""
    adding = [
        f'{name}.'
        for name, module in model.named_modules()
        if any(getattr(module, flag, False) is True for flag in ADDS_ITS_INPUT)
    ]
    kinds = {}
    for layer, aliases in names.items():
        of_layer = {'kind:linear'} if isinstance(layer, (nn.Linear, ExpandedLinear)) else set()
        size = getattr(layer, 'kernel_size', None)
        if isinstance(size, tuple):  # A layer of another library may have a number.
            of_layer.add('kernel:' + 'x'.join(map(str, size)))
        if 1 < getattr(layer, 'groups', 1) == getattr(layer, 'in_channels', None):
            of_layer.add('kind:depthwise')
        for name in aliases:
            residual = {'kind:residual'} if name.startswith(tuple(adding)) else set()
            kinds[name] = of_layer | residual
    return kinds


def _choose(kinds: dict[str, set[str]], cfg: ExpandConfig) -> tuple[set[str], set[str]]:
    """Return the names of chosen layers and of excluded layers."""

    def selected(key: str, patterns: Iterable[str]) -> set[str]:
        found = set()
        for pattern in patterns:
            here = {n for n, of_n in kinds.items() if pattern in of_n or matches(n, pattern)}
            if not here:
                raise UserValueError(_no_match(key, pattern, kinds))
            found |= here
        return found

    included = set(kinds) if cfg.include is None else selected('include', cfg.include)
    excluded = selected('exclude', cfg.exclude or ())
    return included - excluded, excluded


def _no_match(key: str, pattern: str, kinds: dict[str, set[str]]) -> str:
    names = list(kinds)
    known = {'.'.join(name.split('.')[:depth]) for name in names for depth in range(1, 5)}
    if pattern.startswith(('kernel:', 'kind:')):
        known = set().union(*kinds.values())
    near = near_matches(pattern, [*names, *sorted(known.difference(names))], 'layers are:')
    return f'{key}={pattern!r} matches no convolution or linear layer; {near}'


def _refuse(layer: nn.Module, owners: Counter, held: dict[int, str], cfg: ExpandConfig) -> str:
    kinds = nn.Linear, nn.ConvTranspose2d, nn.Conv2d
    if isinstance(layer, ConvNd) and not isinstance(layer, kinds):
        supported = 'nn.Conv2d, nn.ConvTranspose2d and nn.Linear'
        return f'{type(layer).__name__} is not supported; {supported} are'
    reason = refusal(layer, next((k for k in kinds if isinstance(layer, k)), nn.Conv2d))
    if reason:
        return reason
    if any(owners[id(parameter)] > 1 for parameter in layer.parameters()):
        return 'it shares a parameter with another layer'
    places = [held[id(p)] for p in layer.parameters() if id(p) in held]
    if places:
        return f'the model also holds its parameter in {places[0]}, outside its modules'
    try:
        choose_block(cfg.method, LayerSpec.of(layer, cfg.rate, cfg.options))
    except ValueError as error:
        return str(error)
    return ''


def _plan_layer(layer: nn.Module, aliases: list[str], cfg: ExpandConfig, init: str) -> LayerPlan:
    # The meta device takes no memory, and shapes are all that a plan requires.
    block, spec = choose_block(cfg.method, LayerSpec.of(layer, cfg.rate, cfg.options, 'meta'))
    expression = build_expression(block, spec)
    impossible = init == 'preserve' and expression.kernel_refusal()
    if impossible:
        raise UserValueError(
            f'init={cfg.init!r} cannot preserve the weight of {aliases[0]} with '
            f'method={cfg.method!r} and rate={cfg.rate}: {impossible}; or exclude the layer, or '
            "discard its weight with init='default'"
        )
    return LayerPlan(
        aliases[0],
        tuple(aliases),
        block,
        cfg.rate,
        tuple(factor.shape for factor in factors_of(expression)),
        _count(layer),
        _count(expression),
        init,
        spec.options,
    )


def _count(module: nn.Module) -> int:
    lazy = nn.parameter.UninitializedParameter
    return sum(p.numel() for p in module.parameters() if not isinstance(p, lazy))


def _why(skipped: list[SkippedLayer]) -> str:
    if not skipped:
        return 'it has no convolution or linear layer'
    matched = [layer for layer in skipped if layer.reason != 'not included'] or skipped
    shown = '; '.join(f'{layer.name}: {layer.reason}' for layer in matched[:5])
    more = f'; and {len(matched) - 5} more' if len(matched) > 5 else ''
    return f'{shown}{more}'
