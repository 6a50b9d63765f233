"""The parts that branches are made of: scale, identity, filter, deviation, separable kernel."""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..algebra import Affine
from ..batch_sample import BatchSample
from ..layer_spec import output_size
from .node import (
    Node,
    PerChannel,
    Shape,
    add_bias,
    apply_macs,
    fold_macs,
    fold_node,
    geometry,
    kernel_refusal,
    per_channel,
    set_kernel,
    shape_of,
)


class Scale(PerChannel):
    """A node times one factor per output channel.

    Args:
        node: what is scaled.
        start: the factors' first value.
    """

    def __init__(self, node: nn.Module, start: float):
        super().__init__()
        self.node = node
        out, like = shape_of(node)[0], next(chain(node.parameters(), node.buffers()))
        self.scale = nn.Parameter(torch.full((out,), start, device=like.device, dtype=like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the node, then scale."""
        y = self.node(x)
        return y * self.scale.view(-1, 1, 1)

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """Kernel and bias, scaled."""
        weight, bias = fold_node(self.node, dtype, sample)
        scale = self.scale.to(dtype)
        return weight * per_channel(scale, weight), None if bias is None else bias * scale

    def set_kernel(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Give the node what the present factors scale to this."""
        scale = self.scale.to(kernel.dtype)
        kernel = kernel / per_channel(scale, kernel)
        set_kernel(self.node, kernel, None if bias is None else bias / scale)

    def kernel_refusal(self) -> str:
        """The node's."""
        return kernel_refusal(self.node)

    def add_bias(self, shift: Tensor) -> None:
        """Shift the node's by as much as is scaled to this."""
        add_bias(self.node, shift / self.scale)


class Identity(Node):
    """The kernel that hands every input channel on; with a stride, every so many pixels.

    Args:
        conv: a 1x1 convolution of as many outputs as inputs: its stride and padding are taken.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.stride, self.padding = conv.stride, conv.padding
        self.padding_needed = any(conv.padding)
        self.channels, self.per_group = conv.out_channels, conv.in_channels // conv.groups
        eye = torch.eye(self.per_group).repeat(self.channels // self.per_group, 1)
        # Known from the shapes: no part of a checkpoint.
        self.register_buffer('kernel', eye[:, :, None, None].to(conv.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The image, padded and strided."""
        (y, z), (down, right) = self.padding, self.stride
        x = F.pad(x, (z, z, y, y)) if self.padding_needed else x
        return x if (down, right) == (1, 1) else x[..., ::down, ::right]

    @property
    def shape(self) -> Shape:
        """1x1, from a group's inputs to all outputs."""
        return self.channels, self.per_group, 1, 1

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """Ones where an output stands for an input."""
        return self.kernel.to(dtype), None

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Nothing is multiplied."""
        return 0, output_size(size, (1, 1), self.stride, self.padding, (1, 1))


class Filter(Node):
    """A 1x1 node, then a fixed filter of each of its channels (an average, a cosine).

    Args:
        node: of a 1x1 kernel.
        taps: ``(1 or out, kh, kw)``: one filter for all channels, or one for each.
        stride: of the filter.
        dilation: of the filter.
    """

    def __init__(
        self, node: nn.Module, taps: Tensor, stride: tuple[int, int], dilation: tuple[int, int]
    ):
        super().__init__()
        self.node, self.stride, self.dilation = node, stride, dilation
        like = next(node.parameters())
        # Known from the shapes: no part of a checkpoint.
        taps = taps.to(like).expand(shape_of(node)[0], -1, -1)[:, None]
        self.register_buffer('taps', taps.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the node, then the filter."""
        y = self.node(x)
        taps = self.taps.to(y.dtype)
        return F.conv2d(y, taps, None, self.stride, 0, self.dilation, groups=len(taps))

    @property
    def shape(self) -> Shape:
        """The node's channels, the filter's taps."""
        return (*shape_of(self.node)[:2], *self.taps.shape[2:])

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """Every value of the 1x1 kernel times its channel's filter."""
        weight, bias = fold_node(self.node, dtype, sample)
        taps = self.taps.to(dtype)
        return weight * taps, None if bias is None else bias * taps.sum((1, 2, 3))

    def fold_macs(self) -> int:
        """One operation a value of the kernel."""
        out, inside, height, width = self.shape
        return out * inside * height * width + fold_macs(self.node)

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """The node's and the filter's."""
        macs, size = apply_macs(self.node, size)
        size = output_size(size, self.taps.shape[2:], self.stride, (0, 0), self.dilation)
        return macs + self.taps.numel() * size[0] * size[1], size


class Deviation(Node):
    """A convolution that is stored as its difference from a fixed kernel, and starts as that.

    Its weight is no ``nn.Conv2d``'s: a framework's initialisation would undo the start.

    Args:
        conv: whose shape, stride, padding and dilation are taken; it has no bias.
        base: the fixed kernel, of the shape of its weight.
    """

    def __init__(self, conv: nn.Conv2d, base: Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(conv.weight))
        self.register_buffer('base', base.to(conv.weight), persistent=False)
        self._how = conv.stride, conv.padding, conv.dilation, conv.groups
        self._geometry = geometry(conv)

    def forward(self, x: Tensor) -> Tensor:
        """One convolution with the whole kernel."""
        return F.conv2d(x, self.weight + self.base, None, *self._how)

    @property
    def shape(self) -> Shape:
        """The weight's."""
        return tuple(self.weight.shape)

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """The whole kernel."""
        return self.weight.to(dtype) + self.base.to(dtype), None

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Return the operations of one convolution, and the output's size."""
        size = output_size(size, *self._geometry)
        return self.weight.numel() * size[0] * size[1], size


class Separable(Node):
    """A depthwise node, then a 1x1 factor over all of its outputs (DO-Conv; OREPA's last branch).

    Args:
        depthwise: kernel ``(in * multiplier, 1, kh, kw)``, without bias.
        pointwise: kernel ``(out, in / groups * multiplier, 1, 1)``.
        multiplier: outputs of every input channel.
        groups: of the whole.
    """

    def __init__(self, depthwise: nn.Module, pointwise: nn.Conv2d, multiplier: int, groups: int):
        super().__init__()
        self.depthwise, self.pointwise = depthwise, pointwise
        self.multiplier, self.groups = multiplier, groups

    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        return self.pointwise(self.depthwise(x))

    @property
    def shape(self) -> Shape:
        """The pointwise outputs, a group's inputs, the depthwise taps."""
        out, inside, *_ = shape_of(self.pointwise)
        return out, inside // self.multiplier, *shape_of(self.depthwise)[2:]

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """For every input, its filters weighted by what is made of them."""
        taps, _ = fold_node(self.depthwise, dtype, sample)
        weight, bias = fold_node(self.pointwise, dtype, sample)
        weight = weight.view(self.groups, -1, self.shape[1], self.multiplier)
        taps = taps.view(self.groups, self.shape[1], self.multiplier, *taps.shape[2:])
        return torch.einsum('gnme,gmehw->gnmhw', weight, taps).flatten(0, 1), bias

    def fold_macs(self) -> int:
        """Return the operations of the product of both kernels."""
        out, inside, height, width = self.shape
        return out * inside * height * width * self.multiplier + fold_macs(self.depthwise)

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Return the operations of both convolutions, and the output's size."""
        depthwise, size = apply_macs(self.depthwise, size)
        pointwise, size = apply_macs(self.pointwise, size)
        return depthwise + pointwise, size

    def add_bias(self, shift: Tensor) -> None:
        """Shift the pointwise factor's."""
        add_bias(self.pointwise, shift)


def factors_of(node: nn.Module) -> list[nn.Module]:
    """Return the factors in an expression."""
    kinds = nn.Conv2d, nn.Linear, Deviation
    return [module for module in node.modules() if isinstance(module, kinds)]
