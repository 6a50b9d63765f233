"""Branches normalised by statistics of a sample, added up to one kernel."""

from collections.abc import Sequence
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
    # mean / ((variance + eps) / FLOOR), in few operations.
    scaled = torch.rsub(running_variance, eps / FLOOR, alpha=-1 / FLOOR)
    return running_variance.mean(-1, keepdim=True).div(scaled).clamp_min_(1)


class Normed(torch.autograd.Function):
    """Kernels and biases of branches that are normalised by their outputs' mean and variance.

    Gradients of the statistics reach the kernels, not the taps. One function with a backward pass
    of its own: on small layers it is the number of operations that costs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        taps: Tensor,
        excess: Tensor | None,
        eps: float,
        summed: int,
        branches: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return kernels and biases, or their sum, and the mean and biased variance of outputs.

        Tensors of channels hold one branch after another.

        Args:
            ctx: what the backward pass is given.
            taps: inputs of the kernels, ``(pixels, in * kh * kw)``, or with groups
                ``(groups, pixels, in / groups * kh * kw)``.
            excess: of all channels, as of the function of this name; None: there is no floor.
            eps: of the norms.
            summed: this many equal parts of the channels are added up. 1 of several branches:
                nothing is, and biases are constants: a norm around each branch removes them.
            branches: the number of kernels.
            tensors: the kernels ``(out, in / groups, kh, kw)``, the norms' weights, and their
                biases; without these there is no bias.
        """
        kernels, gains = tensors[:branches], tensors[branches : 2 * branches]
        shifts = tensors[2 * branches :]
        sizes = [len(kernel) for kernel in kernels]
        kernels, gains = join(kernels).contiguous(), join(gains)
        outputs = _products(taps, kernels.view(len(kernels), -1), sizes)
        mean, variance = torch.batch_norm_update_stats(outputs, None, None, 0.0)
        squares = variance + eps
        inverse = squares.rsqrt() if excess is None else (squares * excess).rsqrt_()
        scale = gains * inverse
        columns = scale.view(-1, 1, 1, 1)
        weight, bias = kernels * columns, None
        if shifts:
            bias = torch.addcmul(join(shifts), mean, scale, value=-1)
        if summed > 1:
            weight = weight.view(summed, -1, *kernels.shape[1:]).sum(0)
            bias = None if bias is None else bias.view(summed, -1).sum(0)
        ctx.summed, ctx.sizes, ctx.shifts = summed, sizes, len(shifts)
        ctx.save_for_backward(taps, kernels, outputs, mean, squares, inverse, scale, columns)
        ctx.mark_non_differentiable(
            mean, variance, *([bias] if shifts and summed < branches else [])
        )
        ctx.set_materialize_grads(False)
        return weight, bias, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_bias: Tensor | None, *_: None) -> tuple:
        """Return the gradients of kernels, weights and biases; None where the bias is not used."""
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return Normed._backward(ctx, grad, grad_bias)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor | None, grad_bias: Tensor | None) -> tuple:
        taps, kernels, outputs, mean, squares, inverse, scale, columns = ctx.saved_tensors
        grads_shifts = [grad_bias] * ctx.shifts
        if grad is None:
            grad = torch.zeros_like(kernels[: len(kernels) // ctx.summed])
        if ctx.summed > 1:
            grad = grad.repeat(ctx.summed, 1, 1, 1)
            grad_bias = None if grad_bias is None else grad_bias.repeat(ctx.summed)
        elif grad_bias is not None:
            grads_shifts = part(grad_bias, ctx.sizes)
        grad_scale = (grad * kernels).sum((1, 2, 3))
        if grad_bias is not None:
            grad_scale.addcmul_(grad_bias, mean, value=-1)
        # The gradient of the outputs, times -pixels, is slope * (outputs - mean) by the variance
        # and grad_bias * scale by the mean.
        slope = (grad_scale * scale).div_(squares)
        by_mean = scale.new_zeros(()) if grad_bias is None else grad_bias * scale
        constant = torch.addcmul(by_mean, slope, mean, value=-1)
        grad_outputs = torch.addcmul(constant, outputs, slope)
        grad_kernels = (grad * columns).reshape(len(kernels), -1)
        _add_products(grad_kernels, grad_outputs, taps, -1 / len(outputs), ctx.sizes)
        grads_kernels = part(grad_kernels.view_as(kernels), ctx.sizes)
        grads_gains = part(grad_scale.mul_(inverse), ctx.sizes)
        return *(None,) * 5, *grads_kernels, *grads_gains, *grads_shifts[: ctx.shifts]


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate; nothing is done to a single one."""
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def part(tensor: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Split what ``join`` concatenated."""
    return tensor.split(sizes) if len(sizes) > 1 else [tensor]


def _products(taps: Tensor, rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """The outputs ``(pixels, channels)`` of kernels, branch after branch."""
    if taps.dim() == 2:
        return taps @ rows.t()
    groups = len(taps)
    outputs = torch.bmm(taps, _grouped(rows, groups, sizes).mT)
    parts = outputs.split([size // groups for size in sizes], 2)
    return torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1)


def _add_products(
    rows: Tensor, outputs: Tensor, taps: Tensor, times: float, sizes: Sequence[int]
) -> None:
    """Add ``outputs' taps`` times a number to the rows of kernels, branch after branch."""
    if taps.dim() == 2:
        rows.addmm_(outputs.t(), taps, alpha=times)
        return
    groups = len(taps)
    products = torch.bmm(_grouped(outputs.t(), groups, sizes), taps)
    parts = products.split([size // groups for size in sizes], 1)
    rows.add_(torch.cat([part.flatten(0, 1) for part in parts]), alpha=times)


def _grouped(rows: Tensor, groups: int, sizes: Sequence[int]) -> Tensor:
    """Rows of channels, branch after branch, as ``(groups, channels / groups, columns)``."""
    parts = [part.unflatten(0, (groups, -1)) for part in rows.split(sizes)]
    return torch.cat(parts, 1)
