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
        site, x = self._site, self._x
        size = output_size(x.shape[2:], site.kernel_size, site.stride, site.padding, site.dilation)
        every = steps(len(x) * size[0] * size[1], site)
        strides = [step * stride for step, stride in zip(every, site.stride, strict=True)]
        # (N, m * kh * kw, rows * columns)
        taps = F.unfold(x, site.kernel_size, site.dilation, site.padding, strides)
        if site.groups == 1:
            return taps.transpose(0, 1).flatten(1)
        return taps.unflatten(1, (site.groups, -1)).permute(1, 2, 0, 3).flatten(2)

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Of the layer."""
        return self._site.kernel_size

    @property
    def samples(self) -> int:
        """The number of output pixels that are taken, of all images together."""
        return self._taps.shape[-1]

    def taps(self, kernel_size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the inputs of a kernel of the layer's size, or of a 1x1 centred in it.

        Returns:
            ``(m * kh * kw, pixels)``, or with groups ``(groups, m / groups * kh * kw, pixels)``.
        """
        taps = self._taps.to(dtype)
        height, width = self._site.kernel_size
        if tuple(kernel_size) == (height, width):
            return taps
        y, x = margins((height, width), kernel_size)
        return taps[..., y * width + x :: height * width, :]


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
