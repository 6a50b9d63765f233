"""Branches normalised by statistics of a sample, added up to one kernel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FLOOR = 0.1
"""The least variance of a channel, as a fraction of the mean of its norm's channels."""


def excess(running_variance: Tensor, eps: float) -> Tensor:
    """How many times the floor is above the variance of each channel, at least 1.

    A channel that is dead behind a ReLU has no variance. Unbounded, its norm would put a weight
    into the merged kernel that is far above the others, which neither int8 nor float16 holds.

    Args:
        running_variance: of norms, ``(..., channels)``.
        eps: of the norms.
    """
    variance = running_variance + eps
    return variance.mean(-1, keepdim=True).div(variance).mul_(FLOOR).clamp_min_(1)


@dataclass
class Measurement:
    """What branches are normalised by. Tensors of channels hold one branch after another.

    Attributes:
        taps: inputs of the kernels, ``(groups, pixels, in / groups * kh * kw)``.
        running_mean: of all channels; updated as ``F.batch_norm`` does.
        running_var: of all channels; updated as well.
        momentum: of the running statistics.
        eps: of the norms.
        excess: of all channels, as of the function of this name.
    """

    taps: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float
    eps: float
    excess: Tensor


class Normed(torch.autograd.Function):
    """Kernels and biases of branches that are normalised by their outputs' mean and variance.

    Gradients of the statistics reach the kernels, not the taps. One function with a backward pass
    of its own: on small layers it is the number of operations that costs.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        measurement: Measurement,
        summed: int,
        branches: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Return kernels ``(channels, in / groups, kh, kw)`` and biases, or their sum.

        Args:
            ctx: what the backward pass is given.
            measurement: what to normalise by.
            summed: this many equal parts of the channels are added up; 1: nothing is.
            branches: the number of kernels.
            tensors: the kernels ``(out, in / groups, kh, kw)``, the norms' weights, and their
                biases; without these there is no bias.
        """
        taps = measurement.taps
        parts = tensors[:branches], tensors[branches : 2 * branches], tensors[2 * branches :]
        sizes = [len(kernel) for kernel in parts[0]]
        kernels, gains = join(parts[0]), join(parts[1])
        outputs = _ungrouped(torch.bmm(_grouped(kernels, len(taps), sizes), taps.mT), sizes)
        mean, variance = torch.batch_norm_update_stats(
            outputs, measurement.running_mean, measurement.running_var, measurement.momentum
        )
        variance = variance.add_(measurement.eps)
        inverse = (variance * measurement.excess).rsqrt_()
        scale = gains * inverse
        columns = scale.view(-1, 1, 1, 1)
        weight, bias = kernels * columns, None
        if parts[2]:
            bias = torch.addcmul(join(parts[2]), mean, scale, value=-1)
        if summed > 1:
            weight = weight.view(summed, -1, *kernels.shape[1:]).sum(0)
            bias = None if bias is None else bias.view(summed, -1).sum(0)
        ctx.summed, ctx.sizes = summed, sizes
        ctx.save_for_backward(taps, kernels, outputs, mean, variance, inverse, scale, columns)
        return weight, bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_bias: Tensor | None) -> tuple:  # noqa: ANN401
        """Return the gradients of kernels, weights and biases."""
        taps, kernels, outputs, mean, variance, inverse, scale, columns = ctx.saved_tensors
        if ctx.summed > 1:
            grad = grad.repeat(ctx.summed, 1, 1, 1)
            grad_bias = None if grad_bias is None else grad_bias.repeat(ctx.summed)
        grad_scale = (grad * kernels).sum((1, 2, 3))
        if grad_bias is not None:
            grad_scale.addcmul_(grad_bias, mean, value=-1)
        # The gradient of the outputs, times -pixels, is slope * (outputs - mean) by the variance
        # and grad_bias * scale by the mean.
        slope = (grad_scale * scale).div_(variance)
        by_mean = scale.new_zeros(()) if grad_bias is None else grad_bias * scale
        constant = torch.addcmul(by_mean, slope, mean, value=-1)
        grad_outputs = torch.addcmul(constant.view(-1, 1), outputs, slope.view(-1, 1))
        grad_kernels = grad * columns
        pixels = taps.shape[1]
        if len(taps) == 1:
            rows = grad_kernels.view(1, len(kernels), -1)
            rows.baddbmm_(grad_outputs, taps, alpha=-1 / pixels)
        else:
            products = torch.bmm(_grouped(grad_outputs[0], len(taps), ctx.sizes), taps)
            products = _ungrouped(products, ctx.sizes).view_as(kernels)
            grad_kernels.sub_(products, alpha=1 / pixels)
        grads = [*part(grad_kernels, ctx.sizes), *part(grad_scale.mul_(inverse), ctx.sizes)]
        if grad_bias is not None:
            grads += part(grad_bias, ctx.sizes)
        return None, None, None, *grads


def join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def part(tensor: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    return tensor.split(sizes) if len(sizes) > 1 else [tensor]


def _grouped(channels: Tensor, groups: int, sizes: Sequence[int]) -> Tensor:
    """Rows of channels, branch after branch, as ``(groups, channels / groups, columns)``."""
    if groups == 1:
        return channels.view(1, len(channels), -1)
    return torch.cat(
        [part.view(groups, len(part) // groups, -1) for part in channels.split(sizes)], 1
    )


def _ungrouped(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """The channels ``(1, channels, columns)``, branch after branch."""
    groups = len(rows)
    if groups == 1:
        return rows
    parts = rows.split([size // groups for size in sizes], 1)
    return torch.cat([part.flatten(0, 1) for part in parts])[None]
