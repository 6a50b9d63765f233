"""How a unit is run while it trains: chosen when it is built, by its ``forward`` and its block.

A strategy takes a unit, its input, and what the call says beside that (the output padding of a
transposed convolution).
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .expanded_layer import ExpandedLayer

Strategy = Callable[..., Tensor]


def layerwise(unit: 'ExpandedLayer', x: Tensor, *call: object) -> Tensor:
    """Apply one factor after another: the paper's chain."""
    return unit._apply_branches(x, *call)


def folded(unit: 'ExpandedLayer', x: Tensor, *call: object) -> Tensor:
    """Apply the folded kernel."""
    return unit._apply_kernel(x, *unit.folded(), *call)


def cheaper(unit: 'ExpandedLayer', x: Tensor, *call: object) -> Tensor:
    """Apply the folded kernel where that is cheaper, and where its gradient is reduced."""
    folds = unit.folded_parameter is not None or (
        unit.count_macs(x.shape, folded=True) <= unit.count_macs(x.shape, folded=False)
    )
    return (folded if folds else layerwise)(unit, x, *call)


def measured(
    linear: Strategy, sampled: bool, unit: 'ExpandedLayer', x: Tensor, *call: object
) -> Tensor:
    """Let norms take statistics of the batch, from all pixels or from a sample of them.

    Args:
        linear: the strategy where all norms keep their statistics.
        sampled: whether the kernel is folded by the statistics of a sample, where there is one.
        unit: a unit with norms.
        x: its input.
        call: see above.
    """
    if not unit.takes_statistics:
        return linear(unit, x, *call)
    if not x.numel():
        # No statistics to take: as of proposals of which none is left.
        return (folded if sampled else layerwise)(unit, x, *call)
    unit.anchor_norms(x, *call)
    sample = unit._sample(x, *call) if sampled else None
    if sample is None:
        return layerwise(unit, x, *call)
    weight, bias = unit.fold(sample)
    return unit._apply_kernel(x, unit._as_memory_format(weight), bias, *call)


STRATEGIES: dict[str, Strategy] = dict(auto=cheaper, layerwise=layerwise, folded=folded)
"""Strategies of linear units by the values of ``forward``."""


def choose(forward: str, has_kernel: bool, has_norms: bool) -> Strategy:
    """Return how a unit is run while it trains.

    Args:
        forward: 'auto', 'layerwise' or 'folded'.
        has_kernel: not so with ReLU between the factors.
        has_norms: whether there are norms in its block.
    """
    linear = STRATEGIES[forward] if has_kernel else layerwise
    return partial(measured, linear, forward != 'layerwise') if has_norms else linear
