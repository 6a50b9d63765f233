"""Multiply-accumulate operations of expanded layers at the inputs that they get."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..surgery import named_units
from ..surgery.train_mode import eval_mode


@dataclass(frozen=True)
class LayerCost:
    """Operations of one forward pass of an expanded layer.

    Attributes:
        input_shape: shape of the layer's input in this model.
        macs_compact: multiply-accumulate operations of the compact layer.
        macs_layerwise: operations of the paper's chain.
        macs_auto: operations of the cheaper forward, folding included; those of 'layerwise' for a
            block with norms, whose statistics are not counted.
        runs: the forward in training: 'layerwise' or 'folded'; 'auto' for a block with norms that
            chooses by batch and device.
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


@torch.no_grad()
def network_costs(
    expanded: nn.Module, compact: nn.Module, run: Callable[[], Any]
) -> tuple[tuple[int, int, int], dict[str, LayerCost]]:
    """Count the operations of whole networks and of the expanded layers in one forward pass.

    Args:
        expanded: the expanded network; only its shapes matter.
        compact: the network that it was expanded from.
        run: does a forward pass of the compact network.

    Returns:
        Operations of the compact network, of the network with the paper's chains and of the network
        with every unit in its cheaper forward; and the costs of the units by name.
    """
    units = named_units(expanded)
    layers = {name: compact.get_submodule(name) for name in units}
    with FlopCounterMode(display=False) as counter:
        costs = unit_costs(units, layers, run)
    total = counter.get_total_flops() // 2
    layerwise = sum(cost.macs_layerwise - cost.macs_compact for cost in costs.values())
    auto = sum(cost.macs_auto - cost.macs_compact for cost in costs.values())
    return (total, total + layerwise, total + auto), costs


def unit_costs(
    units: dict[str, nn.Module], layers: dict[str, nn.Module], run: Callable[[], Any]
) -> dict[str, LayerCost]:
    """Count the cost of every unit at the inputs of the layers of the same names.

    Args:
        units: the units by name.
        layers: these units, or the layers of the same names in a compact model.
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
        cheaper = unit.is_linear and folded <= layerwise
        totals[0] += unit.count_macs(input_shape, folded=True, with_folding=False)
        totals[1] += layerwise
        totals[2] += folded if cheaper else layerwise
    runs = unit.forward_order
    if runs == 'auto' and (unit.is_linear or not unit.has_kernel):
        runs = 'folded' if cheaper else 'layerwise'
    return LayerCost(input_shapes[-1], *totals, runs)
