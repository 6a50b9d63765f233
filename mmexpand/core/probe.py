"""The pixels that norms in branches take their statistics from where a block is run folded."""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .algebra import Affine
from .site import Site, margins, output_size

STEPS = ((5, 5), (5, 3), (3, 3), (3, 1))
"""Pixels of each axis, of which one is taken; the first that leaves ``SAMPLES``."""

SAMPLES = 256
"""Output pixels, of all images together, that a norm's statistics are taken from at least."""


class Probe:
    """The inputs of a layer's kernel at a part of its output pixels.

    Statistics need only a part of the pixels: every fifth or third of an axis, so few that branches
    applied to them cost next to nothing. The step is odd: pooling and upsampling make even and odd
    pixels differ. Gradients of the statistics reach the kernels, not the batch.

    Args:
        x: the batch ``(N, m, H, W)``, padded where the layer pads before its kernel.
        site: the place of the layer.

    Attributes:
        folded: norms whose kernels were folded by these pixels, and the results.
    """

    def __init__(self, x: Tensor, site: Site):
        self._x, self._site = x, site
        self.folded: dict[nn.Module, Affine] = {}

    @cached_property
    @torch.no_grad()
    def _taps(self) -> Tensor:
        # Not before a norm asks for them: with all norms in eval mode, none does.
        taps = _gather(self._x, self._site)
        groups, *pixels, inputs, height, width = taps.shape
        shape = (math.prod(pixels),) if groups == 1 else (groups, math.prod(pixels))
        return taps.reshape(*shape, inputs * height * width)

    @property
    def samples(self) -> int:
        """The number of output pixels that are taken, of all images together."""
        return self._taps.shape[-2]

    def taps(self, kernel_size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the inputs of a kernel of the layer's size, or of a 1x1 centred in it.

        Returns:
            ``(pixels, m * kh * kw)``, or with groups ``(groups, pixels, m / groups * kh * kw)``.
        """
        taps = self._taps.to(dtype)
        height, width = self._site.kernel_size
        if tuple(kernel_size) == (height, width):
            return taps
        y, x = margins((height, width), kernel_size)
        return taps[..., y * width + x :: height * width]


def _gather(x: Tensor, site: Site) -> Tensor:
    """The inputs of the kernel ``(groups, N, rows, columns, m / groups, kh, kw)``, a view."""
    # One view for all taps and pixels, not one for each tap: on small layers it is the number of
    # operations that costs. (Indexing takes several times as long on a CPU; a convolution with a
    # large stride writes beyond its memory with 1x1 kernels and channels_last images in torch 2.9.)
    layer = site.kernel_size, site.stride, site.padding, site.dilation
    size = output_size(x.shape[2:], *layer)
    step = steps(len(x) * size[0] * size[1], site)
    (top, left), channels = site.padding, x.shape[1] // site.groups
    padded = F.pad(x, (left, left, top, top)) if top or left else x
    by_image, by_channel, *by_pixel = padded.stride()
    taken = [-(-n // every) for n, every in zip(size, step, strict=True)]
    down, right = (a * b * c for a, b, c in zip(step, site.stride, by_pixel, strict=True))
    by_tap = (a * b for a, b in zip(site.dilation, by_pixel, strict=True))
    return padded.as_strided(
        (site.groups, len(x), *taken, channels, *site.kernel_size),
        (channels * by_channel, by_image, down, right, by_channel, *by_tap),
    )


def steps(pixels: int, site: Site) -> tuple[int, int]:
    """The number of rows and of columns of a layer's output to one that is taken.

    Args:
        pixels: of its output, of all images together.
        site: of the layer.
    """
    # Of a transposed convolution they are to be of every kind: on pixels, and between them.
    zeros = math.prod(site.upsampling or (1,))
    for step in STEPS:
        times = math.prod(step)
        if pixels >= SAMPLES * times and math.gcd(times, zeros) == 1:
            return step
    return 1, 1
