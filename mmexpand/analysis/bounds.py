"""Lower bound of the cost of folding: counted operations and bytes at measured rates."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..surgery import named_units
from .complexity import network_costs
from .footprint import trained_bytes
from .steps import clock

PASSES = 6
"""Number of times that a step of SGD with momentum moves a parameter through memory: backward
writes the gradient; the optimizer reads parameter, gradient and momentum, and writes parameter and
momentum. Weight decay is part of the same pass."""

COPIED = 2**28
"""Bytes of the tensor that is copied to measure bandwidth: more than caches hold."""


@dataclass(frozen=True)
class MachineRates:
    """Measured rates of this machine.

    Attributes:
        gemm: floating-point operations per second of a large float32 matrix product; a
            multiply-accumulate is two.
        bandwidth: bytes per second read and written by a copy of a large tensor.
    """

    gemm: float
    bandwidth: float


def measure_rates(device: str = 'cpu') -> MachineRates:
    """Measure a device with torch's present threads, and return the best of several runs."""
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
    """Count multiply-accumulate operations of all products of factors in a forward pass.

    Products are in the cheapest order. Backward takes twice as many operations: each
    product ``C = A B`` has the gradients ``dA = dC B^T`` and ``dB = A^T dC``.
    """
    return sum(unit.expression.fold_macs() for unit in named_units(model).values())


@dataclass(frozen=True)
class FoldingBound:
    """Least time of a training step with folded units, by counting.

    Attributes:
        compact: seconds of the compact network's step, measured.
        products: seconds of the products of factors, forward and backward, at the rate of a large
            matrix product.
        traffic: seconds in which gradients and optimizer state of the additional parameters pass
            through memory, at the bandwidth of a large copy.
        rates: rates of this machine.
    """

    compact: float
    products: float
    traffic: float
    rates: MachineRates

    @property
    def ratio(self) -> float:
        """Return the bound relative to the compact network's step."""
        return (self.compact + self.products + self.traffic) / self.compact


def folding_bound(
    model: nn.Module, compact: nn.Module, compact_seconds: float, rates: MachineRates
) -> FoldingBound:
    """Return the least time of a float32 training step with folding under SGD with momentum.

    Reads of factors, intermediate products, biases and memory allocation are not counted; a real
    step pays for them.

    Args:
        model: the expanded model.
        compact: the model that it was expanded from.
        compact_seconds: the time of the compact model's step.
        rates: rates of the same machine.
    """
    trained = [trained_bytes(m.parameters()) for m in (model, compact)]
    return FoldingBound(
        compact_seconds,
        products=3 * 2 * folding_macs(model) / rates.gemm,
        traffic=PASSES * (trained[0] - trained[1]) / rates.bandwidth,
        rates=rates,
    )


@dataclass(frozen=True)
class CountedStep:
    """Multiply-accumulate operations of a forward pass; a training step takes three times as many.

    Attributes:
        input_shape: ``(N, C, H, W)``.
        compact: operations of the compact network.
        layerwise: operations of the network with the paper's chains.
        folded: operations of the network with folded units, their products included.
        auto: operations of the network with every unit in its cheaper order.
    """

    input_shape: tuple[int, ...]
    compact: int
    layerwise: int
    folded: int
    auto: int

    def ratio(self, forward: str) -> float:
        """Return 'layerwise', 'folded' or 'auto' relative to the compact network."""
        return getattr(self, forward) / self.compact


def counted_step(
    model: nn.Module,
    compact: nn.Module,
    input_shape: tuple[int, ...],
    forward: Callable[[nn.Module, Tensor], Any],
) -> CountedStep:
    """Count the operations of a step without running it.

    Args:
        model: the expanded model; only its shapes matter.
        compact: the model that it was expanded from; it is moved to the device 'meta' and loses
            its values.
        input_shape: ``(N, C, H, W)``; it may be too large to run.
        forward: runs either model on an input.
    """
    images, compact = torch.empty(input_shape, device='meta'), compact.to('meta')
    macs, _ = network_costs(model, compact, lambda: forward(compact, images))
    folded = macs[0] + folding_macs(model)
    return CountedStep(tuple(input_shape), macs[0], macs[1], folded, macs[2])
