"""The kernel of branches that are normalised by the statistics of a batch sample."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .compat import moments

FLOOR = 0.1
"""The least variance of a channel, as a fraction of the mean variance of its norm's channels."""


def excess(running_variance: Tensor, eps: float) -> Tensor:
    """Return the ratio of the floor to the variance of each channel, at least 1.

    A channel that is dead behind a ReLU has no variance. Without a floor its norm would put a
    weight into the merged kernel that is too large for int8 and float16.

    Args:
        running_variance: the norms' running variances ``(..., channels)``.
        eps: the norms' eps.
    """
    # mean / ((variance + eps) / FLOOR), in few operations.
    scaled = torch.rsub(running_variance, eps / FLOOR, alpha=-1 / FLOOR)
    return running_variance.mean(-1, keepdim=True).div(scaled).clamp_min_(1)


class Normed(torch.autograd.Function):
    """Kernels and biases of branches, normalised by their outputs' mean and variance.

    Gradients of the statistics reach the kernels, not the taps. It has its own backward pass,
    because the number of operations determines the time on small layers.
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

        Tensors of channels contain one branch after another.

        Args:
            ctx: the context for the backward pass.
            taps: inputs of the kernels, ``(in * kh * kw, pixels)``, or with groups
                ``(groups, in / groups * kh * kw, pixels)``.
            excess: the function ``excess`` of all channels; None: no floor.
            eps: the norms' eps.
            summed: the number of equal parts of the channels that are added. With 1 and several
                branches nothing is added, and biases have no gradient: a norm around each branch
                removes them.
            branches: the number of kernels.
            tensors: the kernels ``(out, in / groups, kh, kw)``, the norms' weights, and their
                biases; no biases if the layer has none.
        """
        kernels, gains = tensors[:branches], tensors[branches : 2 * branches]
        shifts = tensors[2 * branches :]
        sizes = [len(kernel) for kernel in kernels]
        kernels, gains = join(kernels).contiguous(), join(gains)
        measure = Outputs if taps.dim() == 2 else Covariance
        moments = measure(taps, kernels.view(len(kernels), -1), sizes)
        mean, variance = moments.mean, moments.variance
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
        ctx.moments = moments
        ctx.save_for_backward(kernels, squares, inverse, scale, columns)
        ctx.mark_non_differentiable(
            mean, variance, *([bias] if shifts and summed < branches else [])
        )
        ctx.set_materialize_grads(False)
        return weight, bias, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_bias: Tensor | None, *_: None) -> tuple:
        """Return the gradients of kernels, weights and biases; None for unused biases."""
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return Normed._backward(ctx, grad, grad_bias)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor | None, grad_bias: Tensor | None) -> tuple:
        kernels, squares, inverse, scale, columns = ctx.saved_tensors
        mean = ctx.moments.mean
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
        # The gradient of the variance is -slope / 2, that of the mean -by_mean.
        slope = (grad_scale * scale).div_(squares)
        by_mean = scale.new_zeros(()) if grad_bias is None else grad_bias * scale
        grad_kernels = (grad * columns).reshape(len(kernels), -1)
        ctx.moments.subtract_gradient(grad_kernels, slope, by_mean)
        grads_kernels = part(grad_kernels.view_as(kernels), ctx.sizes)
        grads_gains = part(grad_scale.mul_(inverse), ctx.sizes)
        return *(None,) * 5, *grads_kernels, *grads_gains, *grads_shifts[: ctx.shifts]


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors; return a single tensor unchanged."""
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def part(tensor: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Split a tensor of ``join`` into parts of these sizes."""
    return tensor.split(sizes) if len(sizes) > 1 else [tensor]


class Outputs:
    """Mean and biased variance of kernels' outputs, computed from the outputs.

    Args:
        taps: inputs of the kernels ``(inputs, pixels)``.
        rows: kernels ``(channels, inputs)``.
        sizes: channels of the branches.
    """

    def __init__(self, taps: Tensor, rows: Tensor, sizes: Sequence[int]):
        self._taps = taps.t()
        self._outputs = self._taps @ rows.t()
        self.mean, self.variance = moments(self._outputs)

    def subtract_gradient(self, rows: Tensor, slope: Tensor, by_mean: Tensor) -> None:
        """Subtract from ``rows`` the kernels' gradient through variance and mean, in place.

        Args:
            rows: the kernels' gradient ``(channels, inputs)``.
            slope: -2 times the gradient of the variance ``(channels,)``.
            by_mean: the negative gradient of the mean ``(channels,)`` or ``()``.
        """
        constant = torch.addcmul(by_mean, slope, self.mean, value=-1)
        by_outputs = torch.addcmul(constant, self._outputs, slope)
        rows.addmm_(by_outputs.t(), self._taps, alpha=-1 / len(self._taps))


class Covariance:
    """Mean and biased variance of grouped kernels' outputs, from the covariance of the inputs.

    A group has few inputs, for example one channel of a depthwise layer, so that the covariance is
    cheaper than applying the kernels to all pixels.

    Args:
        taps: ``(groups, inputs, pixels)``.
        rows: kernels ``(channels, inputs)``, branch after branch.
        sizes: channels of the branches.
    """

    def __init__(self, taps: Tensor, rows: Tensor, sizes: Sequence[int]):
        self._sizes, self._groups = sizes, len(taps)
        mean = taps.mean(2, keepdim=True)
        centred = taps - mean
        covariance = centred @ centred.mT / taps.shape[2]
        self._inputs = mean.mT
        rows = _grouped(rows, len(taps), sizes)
        self._products = rows @ covariance
        self.mean = self._ungrouped((rows * self._inputs).sum(2, keepdim=True)).flatten()
        variance = self._ungrouped((rows * self._products).sum(2, keepdim=True)).flatten()
        self.variance = variance.clamp_min_(0)  # Rounding can make it negative.

    def _ungrouped(self, rows: Tensor) -> Tensor:
        parts = rows.split([size // self._groups for size in self._sizes], 1)
        return torch.cat([part.flatten(0, 1) for part in parts])

    def subtract_gradient(self, rows: Tensor, slope: Tensor, by_mean: Tensor) -> None:
        """Subtract the kernels' gradient from ``rows``; see ``Outputs.subtract_gradient``."""
        by_mean = by_mean.expand_as(slope)
        slope, by_mean = (
            _grouped(value[:, None], self._groups, self._sizes) for value in (slope, by_mean)
        )
        rows.sub_(self._ungrouped(torch.addcmul(by_mean * self._inputs, slope, self._products)))


def _grouped(rows: Tensor, groups: int, sizes: Sequence[int]) -> Tensor:
    """Return rows, branch after branch, as ``(groups, channels / groups, columns)``."""
    parts = [part.unflatten(0, (groups, -1)) for part in rows.split(sizes)]
    return torch.cat(parts, 1)
