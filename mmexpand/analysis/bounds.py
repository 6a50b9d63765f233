"""What folding must cost: operations and bytes counted, against rates this machine reaches."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..core.expression import fold_macs
from ..surgery import named_units
from .complexity import unit_costs
from .steps import clock

PASSES = 6
"""Times that a step of SGD with momentum moves a parameter's worth of bytes: backward writes the
gradient; the optimizer reads parameter, gradient and momentum, and writes parameter and momentum.
Weight decay is part of the same pass."""

COPIED = 2**28
"""Bytes of the tensor copied to measure the memory bandwidth: more than caches hold."""


@dataclass(frozen=True)
class MachineRates:
    """What this machine reaches, measured.

    Attributes:
        gemm: floating-point operations per second of a large float32 matrix product; a
            multiply-accumulate is two.
        bandwidth: bytes per second read and written by a copy of a large tensor.
    """

    gemm: float
    bandwidth: float


def measure_rates(device: str = 'cpu') -> MachineRates:
    """Measure a device, with the threads that torch uses now: the best of several runs each."""
    flops = []
    for size in (512, 1024, 2048) if device == 'cpu' else (4096, 8192):
        a, b, out = (torch.rand(size, size, device=device) for _ in range(3))
        multiply = partial(torch.mm, a, b, out=out)
        flops.append(2 * size**3 / _fastest(multiply, device))
    source = torch.zeros(COPIED // 4, device=device)
    target = torch.ones_like(source)
    return MachineRates(max(flops), 2 * COPIED / _fastest(lambda: target.copy_(source), device))


def _fastest(run: Callable[[], Any], device: str, runs: int = 6) -> float:
    times = []
    for _ in range(runs):
        start = clock(device)
        run()
        times.append(clock(device) - start)
    return min(times)


def folding_macs(model: nn.Module) -> int:
    """Multiply-accumulate operations of all products of factors in one forward pass.

    In the cheapest order, for units that fold completely. Backward takes twice as many: each
    product ``C = A B`` has the gradients ``dA = dC B^T`` and ``dB = A^T dC``.
    """
    return sum(fold_macs(unit.expression) for unit in named_units(model).values())


@dataclass(frozen=True)
class FoldingBound:
    """Least time of a training step with folded units, by counting.

    Attributes:
        compact: seconds of the compact network's step, measured.
        products: seconds of the products of factors, forward and backward, at the rate of a large
            matrix product.
        traffic: seconds in which gradients and optimizer state of the additional parameters pass
            through memory, at the bandwidth of a large copy.
        rates: of this machine.
    """

    compact: float
    products: float
    traffic: float
    rates: MachineRates

    @property
    def ratio(self) -> float:
        """The bound, relative to the compact network's step."""
        return (self.compact + self.products + self.traffic) / self.compact


def folding_bound(
    model: nn.Module, compact: nn.Module, compact_seconds: float, rates: MachineRates
) -> FoldingBound:
    """Count what folding adds to a training step of float32 under SGD with momentum.

    Not counted: reading the factors for the products, intermediate products, biases, and the
    system's handing out fresh memory for gradients, all of which a real step pays.

    Args:
        model: expanded.
        compact: the model that it was expanded from.
        compact_seconds: time of its step.
        rates: of the machine that this was measured on.
    """
    trained = [
        sum(p.numel() * p.element_size() for p in m.parameters() if p.requires_grad)
        for m in (model, compact)
    ]
    return FoldingBound(
        compact_seconds,
        products=3 * 2 * folding_macs(model) / rates.gemm,
        traffic=PASSES * (trained[0] - trained[1]) / rates.bandwidth,
        rates=rates,
    )


@dataclass(frozen=True)
class CountedStep:
    """Multiply-accumulate operations of one forward pass; a training step takes three times these.

    Attributes:
        input_shape: ``(N, C, H, W)``.
        compact: of the whole compact network.
        layerwise: of the network with the paper's chains.
        folded: of the network with folded units, their products included.
        auto: of the network with every unit in its cheapest order.
    """

    input_shape: tuple[int, ...]
    compact: int
    layerwise: int
    folded: int
    auto: int

    def ratio(self, forward: str) -> float:
        """Of 'layerwise', 'folded' or 'auto' to the compact network."""
        return getattr(self, forward) / self.compact


def counted_step(
    model: nn.Module,
    compact: nn.Module,
    input_shape: tuple[int, ...],
    forward: Callable[[nn.Module, Tensor], Any],
) -> CountedStep:
    """Count the operations of a step without running it.

    Args:
        model: expanded; only its shapes matter.
        compact: the model that it was expanded from; it is moved to the device 'meta', which
            takes its values.
        input_shape: ``(N, C, H, W)``; may be too large for this machine.
        forward: runs either model on an input.
    """
    images, units = torch.empty(input_shape, device='meta'), named_units(model)
    layers = {name: compact.get_submodule(name) for name in units}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        costs = unit_costs(units, layers, lambda: forward(compact.to('meta'), images)).values()
    total = counter.get_total_flops() // 2
    return CountedStep(
        tuple(input_shape),
        compact=total,
        layerwise=total + sum(cost.macs_layerwise - cost.macs_compact for cost in costs),
        folded=total + folding_macs(model),
        auto=total + sum(cost.macs_auto - cost.macs_compact for cost in costs),
    )
