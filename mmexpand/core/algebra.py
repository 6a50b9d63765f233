"""Composition of linear maps: two convolutions in a row are one convolution (Sec. 3.1).

A kernel is a tensor ``(out, in / groups, kh, kw)`` as in ``torch.nn.Conv2d``. A linear layer is a
1x1 kernel. Stride, padding and dilation do not appear, because they act on pixels and not on taps.
This requires that only the last factor with taps has a stride, and only the first factor pads.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

Affine = tuple[Tensor, Tensor | None]
"""A kernel and its bias."""


def as_kernel(weight: Tensor) -> Tensor:
    """Return a linear layer's weight as a 1x1 kernel, or a kernel unchanged."""
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def compose(first: Affine, second: Affine, groups: int = 1) -> Affine:
    """Multiply two consecutive convolutions into one.

    Args:
        first: kernel ``(p, m / groups, kh1, kw1)`` and bias ``(p,)`` or None; applied first.
        second: kernel ``(n, p / groups, kh2, kw2)`` and bias ``(n,)`` or None.
        groups: the number of groups of both convolutions.

    Returns:
        The kernel ``(n, m / groups, kh1 + kh2 - 1, kw1 + kw2 - 1)`` and the bias ``(n,)`` of
        ``second(first(x))``. The bias is None if both given biases are None.
    """
    (first_weight, first_bias), (second_weight, second_bias) = first, second
    weight = _compose_weight(first_weight, second_weight, groups)
    if first_bias is None:
        return weight, second_bias
    # Every pixel that the second kernel sees contains the first bias, so all taps add it.
    taps = second_weight.sum((2, 3)) if has_taps(second_weight) else second_weight.flatten(1)
    if groups == 1:
        bias = taps @ first_bias
    else:
        bias = torch.bmm(taps.unflatten(0, (groups, -1)), first_bias.view(groups, -1, 1)).flatten()
    return weight, bias if second_bias is None else bias + second_bias


def _compose_weight(first: Tensor, second: Tensor, groups: int) -> Tensor:
    if has_taps(first) and has_taps(second):
        return _compose_taps(first, second, groups)
    # With a 1x1 kernel the product is a plain matrix product.
    height, width = (a + b - 1 for a, b in zip(first.shape[2:], second.shape[2:], strict=True))
    if groups == 1:
        product = _taps_as_rows(second) @ _taps_as_columns(first)
    else:
        left = _taps_as_rows(second).unflatten(0, (groups, -1))
        product = torch.bmm(left, _taps_as_columns(first).unflatten(0, (groups, -1)))
    if first.shape[1] == 1 or height == width == 1:
        # A permutation has ambiguous strides, which would turn a depthwise convolution
        # channels_last. This view has the strides of the contiguous format.
        return product.view(len(second), first.shape[1], height, width)
    return product.view(len(second), height, width, first.shape[1]).permute(0, 3, 1, 2)


# Kernels in the channels_last format, and their gradients, are viewed as matrices and not copied.
# A 1x1 kernel is a matrix already. Permuting it would give its gradient other strides than its own.
def _taps_as_rows(kernel: Tensor) -> Tensor:
    return kernel.permute(0, 2, 3, 1).flatten(0, 2) if has_taps(kernel) else kernel.flatten(1)


def _taps_as_columns(kernel: Tensor) -> Tensor:
    return kernel.permute(0, 2, 3, 1).flatten(1) if has_taps(kernel) else kernel.flatten(1)


def transpose(kernel: Tensor, groups: int) -> Tensor:
    """Convert a convolution's kernel to the transposed convolution's, or back.

    Args:
        kernel: ``(n, m / groups, kh, kw)``; the convolution's image has zeros between its pixels.
        groups: the number of groups.

    Returns:
        The kernel ``(m, n / groups, kh, kw)`` for ``torch.nn.ConvTranspose2d``.
    """
    return kernel.flip(2, 3).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def has_taps(kernel: Tensor) -> bool:
    """Return whether a kernel is larger than 1x1."""
    return kernel.shape[2:] != (1, 1)


def _compose_taps(first: Tensor, second: Tensor, groups: int) -> Tensor:
    # K[n, m, u] = sum over q and a of second[n, q, a] * first[q, m, u - a]. This is the
    # definition of the transposed convolution of the images `second` with the kernel `first`.
    per_group = len(second) // groups
    images = second.unflatten(0, (groups, per_group)).transpose(0, 1).flatten(1, 2)
    product = F.conv_transpose2d(images, first, groups=groups)
    return product.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)


def fold(factors: Sequence[Affine], groups: int = 1) -> Affine:
    """Multiply a chain of convolutions into one, in the cheapest order.

    Args:
        factors: kernels and biases, in the order of application.
        groups: the number of groups of all factors.

    Returns:
        The kernel ``(out, in / groups, kh, kw)`` and the bias ``(out,)`` or None.
    """
    shapes = tuple(tuple(weight.shape) for weight, _ in factors)
    weight, bias = factors[0]
    # The bias is one more input channel of value 1 (Sec. 3.1), so that the kernel products include
    # it. A product of its own would cost backward another gradient as large as the next factor.
    as_channel = bias is not None and len(factors) > 1 and not has_taps(weight)
    if as_channel:
        weight = torch.cat((weight, bias[:, None, None, None]), dim=1)
        factors = ((weight, None), *factors[1:])

    def multiply(start: int, stop: int) -> Affine:
        if stop - start == 1:
            return factors[start]
        split = fold_order(shapes, start, stop)[1]
        return compose(multiply(start, split), multiply(split, stop), groups)

    weight, bias = multiply(0, len(factors))
    if as_channel:
        weight, ones = weight.split((shapes[0][1], 1), dim=1)
        shift = ones.flatten(1).sum(1)
        bias = shift if bias is None else bias + shift
    return weight, bias


@lru_cache(maxsize=4096)
def fold_order(shapes: tuple[tuple[int, ...], ...], start: int, stop: int) -> tuple[int, int]:
    """Return the cheapest order to multiply factors ``start`` to ``stop`` (matrix-chain ordering).

    The product is associative (Sec. 3.1), but its cost depends on the order.

    Args:
        shapes: kernel shapes ``(out, in / groups, kh, kw)`` of the whole chain.
        start: index of the first factor.
        stop: index of the last factor plus 1.

    Returns:
        The number of multiply-accumulate operations, and the index of the outermost split.
    """
    if stop - start == 1:
        return 0, stop
    best = None
    for split in range(start + 1, stop):
        left, right = shapes[start:split], shapes[split:stop]
        macs = right[-1][0] * right[0][1] * left[0][1] * _taps(left) * _taps(right)
        macs += fold_order(shapes, start, split)[0] + fold_order(shapes, split, stop)[0]
        # Take the last of equal splits: with the large factor on the left, every product runs
        # along its rows, where libraries are faster.
        if best is None or macs <= best[0]:
            best = macs, split
    return best


def kernel_size(shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return height and width of the product of kernels of these shapes."""
    return tuple(1 + sum(shape[axis] - 1 for shape in shapes) for axis in (2, 3))


def _taps(shapes: Sequence[Sequence[int]]) -> int:
    height, width = kernel_size(shapes)
    return height * width
