"""Sizes of kernels and of convolutions' outputs."""

from collections.abc import Sequence

from torch import nn

Pair = tuple[int, int]
"""Two values, by axis: height and width."""


def margins(whole: Sequence[int], part: Sequence[int]) -> Pair:
    """Return the taps around a smaller kernel that is centred in a kernel, by axis."""
    return tuple((large - small) // 2 for large, small in zip(whole, part, strict=True))


def output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Return the height and width of a convolution's output."""
    axes = zip(size, kernel, stride, padding, dilation, strict=True)
    return tuple((s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in axes)


def geometry(conv: nn.Conv2d) -> tuple[Sequence[int], ...]:
    """Return kernel size, stride, padding and dilation of a convolution."""
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation
