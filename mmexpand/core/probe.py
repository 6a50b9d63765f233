"""What norms in branches take their statistics from where a block is run folded."""

import math
from itertools import product

import torch
from torch import Tensor

from .site import Site, margins, output_size

STEPS = ((5, 5), (3, 3))
"""Pixels of each axis, of which one is taken; the first that leaves ``SAMPLES``."""

DEPTHWISE_STEPS = ((5, 5), (5, 3), (3, 3), (3, 1))
"""Closer to ``SAMPLES``: the layer itself costs little."""

SAMPLES = 256
"""Output pixels, of all images together, that a norm's statistics are taken from at least."""

FEW_INPUTS = 32
"""Of an output: their covariance is cheaper than outputs, which pass through memory often."""


class Probe:
    """A batch, thinned out, on which norms in branches measure their statistics.

    Statistics need only a part of the pixels: every fifth or third of an axis, so few that branches
    applied to them cost next to nothing. The step is odd: pooling and upsampling make even and odd
    pixels differ. Gradients of the statistics reach the kernels, not the batch.

    The pixels are gathered once for all branches. (Not a convolution with a large stride: with
    1x1 kernels and channels_last images that writes beyond its memory in torch 2.9 on a CPU.)

    Args:
        x: the batch ``(N, m, H, W)``, padded where the layer does it apart.
        site: of the layer.
    """

    def __init__(self, x: Tensor, site: Site):
        # (groups, m / groups, kh, kw, pixels)
        self._taps = _gather(x.detach(), site).unflatten(0, (site.groups, -1)).flatten(4)
        self.samples = self._taps.shape[4]
        inputs = self._taps[0, ..., 0].numel()
        self.few_inputs = inputs <= max(FEW_INPUTS, 2 * site.out_channels // site.groups)
        self._moments: tuple[Tensor, Tensor] | None = None

    def statistics(self, kernels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of what kernels, centred in the layer's, give.

        They are linear and quadratic in a kernel: where its inputs are few, their covariance is
        taken once, and no branch is applied to the pixels.

        Args:
            kernels: ``(branches, out, in / groups, kh, kw)``.

        Returns:
            Both ``(branches, out)``.
        """
        groups = len(self._taps)
        y, x = margins(self._taps.shape[2:4], kernels.shape[3:])
        rows, columns = slice(y, y + kernels.shape[3]), slice(x, x + kernels.shape[4])
        weight = kernels.flatten(2).unflatten(1, (groups, -1))
        if self.few_inputs:
            mean, covariance = self._moments_of_inputs(kernels.dtype)
            mean = mean[:, :, rows, columns].flatten(1)
            covariance = covariance[:, :, rows, columns, :, rows, columns].flatten(4).flatten(1, 3)
            variance = ((weight @ covariance) * weight).sum(3)
            return (weight @ mean[:, :, None]).flatten(1), variance.flatten(1)
        taps = self._taps[:, :, rows, columns].flatten(1, 3)
        outputs = (weight.to(taps.dtype) @ taps).to(kernels.dtype)
        # Two passes of products: torch.var_mean takes several times as long on a CPU.
        mean = outputs.mean(3, keepdim=True)
        return mean.flatten(1), (outputs - mean).square().mean(3).flatten(1)

    def _moments_of_inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean ``(groups, m, kh, kw)`` and covariance ``(groups, m, kh, kw, m, kh, kw)``."""
        if self._moments is None:
            shape = self._taps.shape[:4]
            taps = self._taps.flatten(1, 3).to(dtype)
            mean = taps.mean(2, keepdim=True)
            centred = taps - mean
            covariance = centred @ centred.mT / self.samples
            self._moments = mean.view(shape), covariance.view(*shape, *shape[1:])
        return self._moments


def _gather(x: Tensor, site: Site) -> Tensor:
    """What each tap sees: ``(m, kh, kw, N, ...)``, rows and columns of the output thinned out."""
    size = output_size(x.shape[2:], site.kernel_size, site.stride, site.padding, site.dilation)
    step = steps(len(x) * size[0] * size[1], site)
    strides = [a * b for a, b in zip(step, site.stride, strict=True)]
    images = x.transpose(0, 1)
    if math.prod(strides) < math.prod(site.kernel_size):
        images = images.contiguous()  # Once, rather than once a tap.
    thinned = [-(-n // s) for n, s in zip(size, step, strict=True)]
    taps = x.new_zeros(x.shape[1], *site.kernel_size, len(x), *thinned)
    for tap in product(*map(range, site.kernel_size)):
        offsets = (at * d - p for at, d, p in zip(tap, site.dilation, site.padding, strict=True))
        (rows, to_rows), (columns, to_columns) = map(
            _inside, x.shape[2:], thinned, strides, offsets
        )
        taps[:, tap[0], tap[1], :, to_rows, to_columns] = images[:, :, rows, columns]
    return taps


def steps(pixels: int, site: Site) -> tuple[int, int]:
    """Of the rows and the columns of a layer's output, how many there are to one that is taken.

    Args:
        pixels: of its output, of all images together.
        site: of the layer.
    """
    # Of a transposed convolution they are to be of every kind: on pixels, and between them.
    zeros = math.prod(site.upsampling or (1,))
    depthwise = site.groups == site.in_channels > 1
    for step in DEPTHWISE_STEPS if depthwise else STEPS:
        times = math.prod(step)
        if pixels >= SAMPLES * times and math.gcd(times, zeros) == 1:
            return step
    return 1, 1


def _inside(size: int, count: int, stride: int, offset: int) -> tuple[slice, slice]:
    """Of the places offset + i stride, i < count, those in an axis of this size, and their i."""
    first = max(0, -(offset // stride))
    last = min(count, (size - 1 - offset) // stride + 1)
    if last <= first:
        return slice(0, 0), slice(0, 0)
    return slice(first * stride + offset, (last - 1) * stride + offset + 1, stride), slice(
        first, last
    )
