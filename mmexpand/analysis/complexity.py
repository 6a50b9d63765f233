"""Multiply-accumulate operations of expanded layers, counted at the inputs they really see."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.order import Segments
from ..surgery import named_units
from ..surgery.modes import eval_mode


@dataclass(frozen=True)
class LayerCost:
    """What one forward pass of an expanded layer costs.

    Attributes:
        input_shape: of the layer in this model.
        macs_compact: multiply-accumulate operations of the layer that it stands for.
        macs_layerwise: of the paper's chain.
        macs_auto: of the cheapest order of association, folding included.
        segments: that order.
    """

    input_shape: tuple[int, ...]
    macs_compact: int
    macs_layerwise: int
    macs_auto: int
    segments: Segments


@torch.no_grad()
def layer_costs(model: nn.Module, forward: Callable[[nn.Module], Any]) -> dict[str, LayerCost]:
    """Count the cost of every unit of an expanded model in one forward pass.

    A layer that is called several times is counted for all calls; the order shown is that of the
    last.

    Args:
        model: an expanded model, run in eval mode and left as it was.
        forward: runs the model on an input.
    """
    units = named_units(model)
    with eval_mode(model):
        return unit_costs(units, units, lambda: forward(model))


def unit_costs(
    units: dict[str, nn.Module], layers: dict[str, nn.Module], run: Callable[[], Any]
) -> dict[str, LayerCost]:
    """Count the cost of every unit, at the inputs that the layers of the same names are given.

    Args:
        units: the units by name.
        layers: those units, or the layers that they stand for in a compact model.
        run: does a forward pass through the layers.
    """
    calls: dict[str, list[tuple[int, ...]]] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: calls.setdefault(name, []).append(tuple(args[0].shape))
        )
        for name, layer in layers.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: _cost(units[name], shapes) for name, shapes in calls.items()}


def _cost(unit: nn.Module, input_shapes: list[tuple[int, ...]]) -> LayerCost:
    count = len(unit.factor_shapes)
    folded, layerwise = ((0, count),), tuple((index, index + 1) for index in range(count))
    totals = [0, 0, 0]
    for input_shape in input_shapes:
        # In training mode a block with norms in its branches is never folded.
        segments = unit.segments(input_shape) if unit.is_linear else layerwise
        totals[0] += unit.count_macs(input_shape, folded, with_folding=False)
        totals[1] += unit.count_macs(input_shape, layerwise)
        totals[2] += unit.count_macs(input_shape, segments)
    return LayerCost(input_shapes[-1], *totals, segments)


def describe_segments(segments: Segments) -> str:
    """An order of association in words: 'layerwise', 'folded', or like '1 (2 3)'."""
    count = segments[-1][1]
    if len(segments) == 1:
        return 'folded'
    if len(segments) == count:
        return 'layerwise'
    parts = (' '.join(str(i + 1) for i in range(start, stop)) for start, stop in segments)
    return ' '.join(f'({part})' if ' ' in part else part for part in parts)
