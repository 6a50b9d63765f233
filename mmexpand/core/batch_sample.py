"""The batch sample: pixels from which norms in branches take statistics in a folded block."""

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from .algebra import Affine
from .geometry import Pair, margins, output_size
from .layer_spec import LayerSpec

STEPS = ((5, 5), (5, 3), (3, 3), (3, 1))
"""Sampling steps of rows and columns, from large to small; the first step that leaves enough
pixels is used."""

SAMPLES = 256
"""Least number of output pixels, of all images together, for a norm's statistics."""

NESTED_SAMPLES = 512
"""Least number for blocks with norms inside of norms: `dbb` diverges with fewer."""


class BatchSample:
    """The inputs of a layer's kernel at a part of its output pixels.

    Every fifth or third pixel of an axis is enough for statistics, and applying branches to so few
    pixels costs next to nothing. The step is odd because pooling and upsampling make even and odd
    pixels differ. The first pixel moves from image to image, so that all rows and columns count
    equally, on the padded border too. Gradients of the statistics reach the kernels, not the batch.

    Args:
        x: the batch ``(N, m, H, W)``, already padded if the unit pads before the block.
        spec: the layer spec.
        least: least number of pixels, of all images together.

    Attributes:
        folded: kernel and bias of each norm that was folded by this sample already.
    """

    def __init__(self, x: Tensor, spec: LayerSpec, least: int = SAMPLES):
        self._x, self._spec, self._least = x, spec, least
        self.folded: dict[nn.Module, Affine] = {}

    @cached_property
    @torch.no_grad()
    def _taps(self) -> Tensor:
        # Computed on demand: with all norms in eval mode, the taps are never used.
        spec, x = self._spec, self._x
        size = output_size(x.shape[2:], spec.kernel_size, spec.stride, spec.padding, spec.dilation)
        every = steps(len(x) * size[0] * size[1], spec, self._least)
        geometry = spec.kernel_size, spec.stride, spec.padding, spec.dilation
        index, outside = _positions(tuple(x.shape), size, every, *geometry, x.device)
        taps = x.flatten(2).gather(2, index)
        groups = () if spec.groups == 1 else (spec.groups,)
        inputs = x.shape[1] // spec.groups * math.prod(spec.kernel_size)
        taps = torch.cat(taps.view(len(x), *groups, inputs, -1).unbind(), -1)
        taps.view(x.shape[1], -1).index_fill_(1, outside, 0)
        return taps

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Return the height and width of the layer's kernel."""
        return self._spec.kernel_size

    @property
    def samples(self) -> int:
        """Return the number of sampled output pixels, of all images together."""
        return self._taps.shape[-1]

    def taps(self, kernel_size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the inputs of a kernel of the layer's size, or of a 1x1 kernel centred in it.

        Returns:
            The taps ``(m * kh * kw, pixels)``, or with groups
            ``(groups, m / groups * kh * kw, pixels)``.
        """
        taps = self._taps.to(dtype)
        height, width = self._spec.kernel_size
        if tuple(kernel_size) == (height, width):
            return taps
        y, x = margins((height, width), kernel_size)
        return taps[..., y * width + x :: height * width, :]


@lru_cache(maxsize=32)
def _positions(
    shape: tuple[int, int, int, int],
    output_size: Pair,
    every: Pair,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return the indices of the sampled taps in a batch of shape ``(N, m, H, W)``.

    Returns:
        Indices into the flattened images, ``(N, m, kh * kw * rows * columns)``, and the indices
        of taps on the zero padding, into the flattened ``(kh * kw, N, rows * columns)``.
    """
    (images, channels), size = shape[:2], shape[2:]
    image = torch.arange(images, device=device)
    places, inside = [], []
    for axis, first in enumerate((2 * image, image + every[1] // 2)):
        step, length = every[axis], output_size[axis]
        grid = torch.arange(0, length, step, device=device) + first[:, None] % step
        # The last step may reach beyond the last pixel. The grid is scaled instead of clamped,
        # because clamping would count the last pixel twice.
        taken = (2 * grid + 1) * length // (2 * step * grid.shape[1])
        taps = dilation[axis] * torch.arange(kernel_size[axis], device=device) - padding[axis]
        place = taps[:, None] + stride[axis] * taken[:, None]  # (N, taps, pixels)
        inside.append((place >= 0) & (place < size[axis]))
        places.append(place.clamp(0, size[axis] - 1))
    (rows, columns), (rows_inside, columns_inside) = (
        (vertical[:, :, None, :, None], horizontal[:, None, :, None])
        for vertical, horizontal in (places, inside)
    )
    index = (rows * size[1] + columns).view(images, 1, -1)
    taps_first = (rows_inside & columns_inside).flatten(1, 2).transpose(0, 1)
    return index.expand(-1, channels, -1), taps_first.logical_not().flatten().nonzero().flatten()


def steps(pixels: int, spec: LayerSpec, least: int = SAMPLES) -> tuple[int, int]:
    """Return the sampling stride along the rows and columns of a layer's output.

    Args:
        pixels: the number of output pixels, of all images together.
        spec: the layer spec.
        least: least number of sampled pixels.
    """
    # A transposed convolution's image has zeros between pixels. A step that shares a divisor with
    # its upsampling would sample some of the phases only.
    zeros = math.prod(spec.upsampling or (1,))
    for step in STEPS:
        times = math.prod(step)
        if pixels >= least * times and math.gcd(times, zeros) == 1:
            return step
    return 1, 1
