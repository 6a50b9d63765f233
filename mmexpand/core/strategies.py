"""Strategies to run a unit in training mode, chosen from its ``forward`` and its block.

A strategy is a function of a unit, its input, and further arguments of the layer's forward (the
output padding of a transposed convolution).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # The layer imports this module.
    from .expanded_layer import ExpandedLayer

Strategy = Callable[..., Tensor]


def layerwise(unit: ExpandedLayer, x: Tensor, *call: object) -> Tensor:
    """Apply one factor after another, as the paper does."""
    if torch.is_grad_enabled():
        unit.kernel.gradient.complete = False
    return unit._apply_branches(x, *call)


def folded(unit: ExpandedLayer, x: Tensor, *call: object) -> Tensor:
    """Apply the folded kernel."""
    # Not in one expression, which the compiler of torch 2.5 cannot resume.
    weight, bias = unit.folded()
    return unit._apply_kernel(x, weight, bias, *call)


def cheaper(unit: ExpandedLayer, x: Tensor, *call: object) -> Tensor:
    """Run folded if this is cheaper or if DDP reduces the folded gradient, otherwise layerwise."""
    folds = unit.folded_parameter is not None or (
        unit.count_macs(x.shape, folded=True) <= unit.count_macs(x.shape, folded=False)
    )
    return (folded if folds else layerwise)(unit, x, *call)


def measured(
    linear: Strategy, sampled: bool, unit: ExpandedLayer, x: Tensor, *call: object
) -> Tensor:
    """Run a unit whose norms take statistics of the batch, from a batch sample or all pixels.

    Args:
        linear: the strategy if all norms keep their statistics.
        sampled: whether to run folded, with a batch sample, if the unit has enough pixels.
        unit: a unit with norms.
        x: its input.
        call: further arguments of the layer's forward.
    """
    if not unit.takes_statistics:
        return linear(unit, x, *call)
    if not unit.is_anchored:
        unit.anchor_norms(x, *call)
        if not unit.is_anchored:
            # This batch has no statistics. The function stays that of the given layer.
            return folded(unit, x, *call)
    if not x.numel():
        # An empty batch has no statistics, as when no proposal is left.
        return (folded if sampled else layerwise)(unit, x, *call)
    sample = unit._sample(x, *call) if sampled else None
    if sample is None:
        return layerwise(unit, x, *call)
    weight, bias = unit.fold(sample)
    return unit._apply_kernel(x, unit._as_memory_format(weight), bias, *call)


STRATEGIES: dict[str, Strategy] = dict(auto=cheaper, layerwise=layerwise, folded=folded)
"""Strategies of linear units by the values of ``forward``."""

FORWARDS = tuple(STRATEGIES)


def choose(forward: str, has_kernel: bool, has_norms: bool) -> Strategy:
    """Return the strategy of a unit.

    Args:
        forward: 'auto', 'layerwise' or 'folded'.
        has_kernel: whether the expression has a kernel: not with ReLU between the factors.
        has_norms: whether the expression has norms.
    """
    linear = STRATEGIES[forward] if has_kernel else layerwise
    return partial(measured, linear, forward != 'layerwise') if has_norms else linear
