"""The pixels that norms in branches take their statistics from where a block is run folded."""

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

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
    """The inputs of the kernel ``(groups, N, rows, columns, m / groups, kh, kw)``."""
    # One operation for all taps and pixels, not one for each tap: on small layers it is the number
    # of operations that costs. (Not a convolution with a large stride: with 1x1 kernels and
    # channels_last images that writes beyond its memory in torch 2.9 on a CPU.)
    layer = site.kernel_size, site.stride, site.padding, site.dilation
    size = output_size(x.shape[2:], *layer)
    step = steps(len(x) * size[0] * size[1], site)
    indices, inside = _indices(tuple(x.shape), site.groups, *layer, size, step, x.dtype, x.device)
    taps = x[indices]
    if inside is not None:
        taps.mul_(inside)
    return taps


@lru_cache(maxsize=256)
def _indices(
    shape: tuple[int, int, int, int],
    groups: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, int],
    step: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Indices of ``(groups, N, rows, columns, m / groups, kh, kw)`` in an image, and where it pads.

    The second is 1 inside of the image and 0 outside; None where no kernel leaves the image.
    """
    images = torch.arange(shape[0], device=device).view(-1, 1, 1, 1, 1, 1)
    channels = torch.arange(shape[1], device=device).view(groups, 1, 1, 1, -1, 1, 1)
    axes, inside = [], []
    for axis in (0, 1):
        outputs = torch.arange(0, size[axis], step[axis], device=device) * stride[axis]
        taps = torch.arange(kernel_size[axis], device=device) * dilation[axis] - padding[axis]
        at = outputs[:, None] + taps
        # (rows, 1, 1, kh, 1) and (columns, 1, 1, kw)
        at = at[:, None, None, :, None] if axis == 0 else at[:, None, None, :]
        axes.append(at.clamp(0, shape[2 + axis] - 1))
        inside.append(at == axes[axis])
    both = inside[0] & inside[1]
    return (images, channels, *axes), None if both.all() else both.to(dtype)


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
