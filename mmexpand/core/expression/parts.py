"""Parts of branches: scale, identity, filter, deviation and separable kernel."""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..algebra import Affine
from ..batch_sample import BatchSample
from ..geometry import geometry, output_size
from .node import (
    Node,
    PerChannel,
    Shape,
    per_channel,
)


class Scale(PerChannel):
    """A node times one trained number per output channel.

    Args:
        node: the node to scale.
        start: the first value of the scales ``(out,)``.
    """

    def __init__(self, node: nn.Module, start: float):
        super().__init__()
        self.node = node
        out, like = node.shape[0], next(chain(node.parameters(), node.buffers()))
        self.scale = nn.Parameter(torch.full((out,), start, device=like.device, dtype=like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the node, then scale."""
        y = self.node(x)
        return y * self.scale.view(-1, 1, 1)

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """Return the node's kernel and bias, scaled."""
        weight, bias = self.node.fold(dtype, sample)
        scale = self.scale.to(dtype)
        return weight * per_channel(scale, weight), None if bias is None else bias * scale

    def set_kernel(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Set the node such that the present scales turn it into this kernel and bias."""
        scale = self.scale.to(kernel.dtype)
        kernel = kernel / per_channel(scale, kernel)
        self.node.set_kernel(kernel, None if bias is None else bias / scale)

    def add_bias(self, shift: Tensor) -> None:
        """Shift the node's bias by the shift divided by the scales."""
        self.node.add_bias(shift / self.scale)


class Identity(Node):
    """The identity kernel, with the padding and stride of a convolution.

    Args:
        conv: a 1x1 convolution with as many outputs as inputs; gives stride and padding.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.stride, self.padding = conv.stride, conv.padding
        self.padding_needed = any(conv.padding)
        self.channels, self.per_group = conv.out_channels, conv.in_channels // conv.groups
        eye = torch.eye(self.per_group).repeat(self.channels // self.per_group, 1)
        # Not in checkpoints, because it follows from the shapes.
        self.register_buffer('kernel', eye[:, :, None, None].to(conv.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the padded and strided image."""
        (y, z), (down, right) = self.padding, self.stride
        x = F.pad(x, (z, z, y, y)) if self.padding_needed else x
        return x if (down, right) == (1, 1) else x[..., ::down, ::right]

    @property
    def shape(self) -> Shape:
        """Return ``(out, in / groups, 1, 1)``."""
        return self.channels, self.per_group, 1, 1

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """Return the identity kernel, and no bias."""
        return self.kernel.to(dtype), None

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Return 0 operations, and the output size."""
        return 0, output_size(size, (1, 1), self.stride, self.padding, (1, 1))


class Filter(Node):
    """A 1x1 node, then a fixed filter of each output channel (an average or a cosine).

    Args:
        node: a node with a 1x1 kernel.
        taps: ``(1, kh, kw)``, a filter for all channels, or ``(out, kh, kw)``, a filter for each.
        stride: the filter's stride.
        dilation: the filter's dilation.
    """

    def __init__(
        self, node: nn.Module, taps: Tensor, stride: tuple[int, int], dilation: tuple[int, int]
    ):
        super().__init__()
        self.node, self.stride, self.dilation = node, stride, dilation
        like = next(node.parameters())
        # Not in checkpoints, because they follow from the shapes.
        taps = taps.to(like).expand(node.shape[0], -1, -1)[:, None]
        self.register_buffer('taps', taps.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the node, then the filter."""
        y = self.node(x)
        taps = self.taps.to(y.dtype)
        return F.conv2d(y, taps, None, self.stride, 0, self.dilation, groups=len(taps))

    @property
    def shape(self) -> Shape:
        """Return the node's channels with the filter's height and width."""
        return (*self.node.shape[:2], *self.taps.shape[2:])

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """Return the 1x1 kernel times each output channel's filter, and the filtered bias."""
        weight, bias = self.node.fold(dtype, sample)
        taps = self.taps.to(dtype)
        return weight * taps, None if bias is None else bias * taps.sum((1, 2, 3))

    def fold_macs(self) -> int:
        """Return the node's operations plus one per value of the kernel."""
        out, inside, height, width = self.shape
        return out * inside * height * width + self.node.fold_macs()

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Return the operations of the node and the filter, and the output size."""
        macs, size = self.node.apply_macs(size)
        size = output_size(size, self.taps.shape[2:], self.stride, (0, 0), self.dilation)
        return macs + self.taps.numel() * size[0] * size[1], size


class Deviation(Node):
    """A convolution stored as its difference from a fixed kernel; the difference starts at zero.

    It is not an ``nn.Conv2d``, because a framework's initialisation would undo this start.

    Args:
        conv: a convolution without bias; gives shape, stride, padding and dilation.
        base: the fixed kernel, in the shape of the convolution's weight.
    """

    def __init__(self, conv: nn.Conv2d, base: Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(conv.weight))
        self.register_buffer('base', base.to(conv.weight), persistent=False)
        self._how = conv.stride, conv.padding, conv.dilation, conv.groups
        self._geometry = geometry(conv)

    def forward(self, x: Tensor) -> Tensor:
        """Apply one convolution with the sum of difference and fixed kernel."""
        return F.conv2d(x, self.weight + self.base, None, *self._how)

    @property
    def shape(self) -> Shape:
        """Return the weight's shape."""
        return tuple(self.weight.shape)

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """Return the sum of difference and fixed kernel, and no bias."""
        return self.weight.to(dtype) + self.base.to(dtype), None

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Return the operations of one convolution, and the output size."""
        size = output_size(size, *self._geometry)
        return self.weight.numel() * size[0] * size[1], size


class Separable(Node):
    """A depthwise node, then a 1x1 factor over its outputs (DO-Conv; OREPA's last branch).

    Args:
        depthwise: a node without bias; kernel ``(in * multiplier, 1, kh, kw)``.
        pointwise: a factor; kernel ``(out, in / groups * multiplier, 1, 1)``.
        multiplier: number of depthwise outputs per input channel.
        groups: number of groups of the pointwise factor.
    """

    def __init__(self, depthwise: nn.Module, pointwise: nn.Conv2d, multiplier: int, groups: int):
        super().__init__()
        self.depthwise, self.pointwise = depthwise, pointwise
        self.multiplier, self.groups = multiplier, groups

    def forward(self, x: Tensor) -> Tensor:
        """Apply the depthwise node, then the pointwise factor."""
        return self.pointwise(self.depthwise(x))

    @property
    def shape(self) -> Shape:
        """Return ``(out, in / groups, kh, kw)`` with the depthwise node's height and width."""
        out, inside, *_ = self.pointwise.shape
        return out, inside // self.multiplier, *self.depthwise.shape[2:]

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """Return the sums of each input's depthwise filters, weighted by the pointwise kernel."""
        taps, _ = self.depthwise.fold(dtype, sample)
        weight, bias = self.pointwise.fold(dtype, sample)
        weight = weight.view(self.groups, -1, self.shape[1], self.multiplier)
        taps = taps.view(self.groups, self.shape[1], self.multiplier, *taps.shape[2:])
        return torch.einsum('gnme,gmehw->gnmhw', weight, taps).flatten(0, 1), bias

    def fold_macs(self) -> int:
        """Return the operations of the product of both kernels."""
        out, inside, height, width = self.shape
        return out * inside * height * width * self.multiplier + self.depthwise.fold_macs()

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Return the operations of both convolutions, and the output size."""
        depthwise, size = self.depthwise.apply_macs(size)
        pointwise, size = self.pointwise.apply_macs(size)
        return depthwise + pointwise, size

    def add_bias(self, shift: Tensor) -> None:
        """Shift the pointwise factor's bias."""
        self.pointwise.add_bias(shift)


def factors_of(node: nn.Module) -> list[nn.Module]:
    """Return the factors in an expression."""
    kinds = nn.Conv2d, nn.Linear, Deviation
    return [module for module in node.modules() if isinstance(module, kinds)]
