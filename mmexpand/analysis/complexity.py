"""Multiply-accumulate operations of expanded layers, counted at the inputs they really see."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..surgery import named_units
from ..surgery.train_mode import eval_mode


@dataclass(frozen=True)
class LayerCost:
    """What one forward pass of an expanded layer costs.

    Attributes:
        input_shape: of the layer in this model.
        macs_compact: multiply-accumulate operations of the layer that it stands for.
        macs_layerwise: of the paper's chain.
        macs_auto: of the cheaper of the two, folding included.
        runs: that one: 'layerwise' or 'folded'.
    """

    input_shape: tuple[int, ...]
    macs_compact: int
    macs_layerwise: int
    macs_auto: int
    runs: str


@torch.no_grad()
def layer_costs(model: nn.Module, forward: Callable[[nn.Module], Any]) -> dict[str, LayerCost]:
    """Count the cost of every unit of an expanded model in one forward pass.

    A layer that is called several times is counted for all calls; ``runs`` is that of the
    last call.

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
    totals = [0, 0, 0]
    for input_shape in input_shapes:
        layerwise = unit.count_macs(input_shape, folded=False)
        folded = unit.count_macs(input_shape, folded=True) if unit.has_kernel else layerwise
        # In training mode a block with norms in its branches is never folded.
        cheaper = unit.is_linear and folded <= layerwise
        totals[0] += unit.count_macs(input_shape, folded=True, with_folding=False)
        totals[1] += layerwise
        totals[2] += folded if cheaper else layerwise
    return LayerCost(input_shapes[-1], *totals, 'folded' if cheaper else 'layerwise')
