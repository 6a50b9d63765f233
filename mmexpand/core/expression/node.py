"""The nodes of an expression, and the functions that treat nodes and factors alike."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..algebra import Affine
from ..batch_sample import BatchSample
from ..layer_spec import margins, output_size

Shape = tuple[int, int, int, int]
"""A kernel's shape ``(out, in / groups, kh, kw)``."""

Solve = Callable[[Tensor, list[Tensor], int], list[Tensor]]
"""Finds factors with a given product: kernel, present factors, groups -> factors in float64."""


class Node(nn.Module):
    """A part of an expression that is not a factor."""

    @property
    def shape(self) -> Shape:
        """The kernel's shape ``(out, in / groups, kh, kw)``."""
        raise NotImplementedError

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """The kernel and bias, computed in ``dtype``; differentiable.

        Args:
            dtype: what to compute in.
            sample: of a batch, where norms are to take its statistics; None: the running ones.
        """
        raise NotImplementedError

    def fold_macs(self) -> int:
        """Multiply-accumulate operations of folding."""
        return sum(fold_macs(node) for node in self.children())

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Operations of applying it layer by layer to one image, and the output's size."""
        raise NotImplementedError

    def set_kernel(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Take values whose folding is this kernel and bias, to rounding.

        Raises:
            ValueError: if no values do, as in ``kernel_refusal``.
        """
        raise NotImplementedError

    def kernel_refusal(self) -> str:
        """Why no values fold to an arbitrary kernel; empty where some do."""
        return ''

    def add_bias(self, shift: Tensor) -> None:
        """Shift the bias that the node folds to; for nodes that have one."""
        raise NotImplementedError


def fold_node(node: nn.Module, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
    """The kernel and bias of a node or a factor, computed in ``dtype``."""
    if isinstance(node, Node):
        return node.fold(dtype, sample)
    bias = None if node.bias is None else node.bias.to(dtype)
    return as_kernel(node.weight).to(dtype), bias


def shape_of(node: nn.Module) -> Shape:
    """The kernel's shape of a node or a factor."""
    return node.shape if isinstance(node, Node) else tuple(as_kernel(node.weight).shape)


def fold_macs(node: nn.Module) -> int:
    """Multiply-accumulate operations of folding a node; none for a factor."""
    return node.fold_macs() if isinstance(node, Node) else 0


def apply_macs(node: nn.Module, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Operations of applying a node or a factor to one image, and the output's size."""
    if isinstance(node, Node):
        return node.apply_macs(size)
    if isinstance(node, nn.Conv2d):
        size = output_size(size, *geometry(node))
    return node.weight.numel() * size[0] * size[1], size


def set_kernel(node: nn.Module, kernel: Tensor, bias: Tensor | None) -> None:
    """Give a node or a factor this kernel and bias."""
    if isinstance(node, Node):
        node.set_kernel(kernel, bias)
        return
    node.weight.copy_(kernel.reshape(node.weight.shape))
    if node.bias is not None:
        node.bias.copy_(bias)


def add_bias(node: nn.Module, shift: Tensor) -> None:
    """Shift the bias that a node or a factor, which has one, folds to."""
    if isinstance(node, Node):
        node.add_bias(shift)
    else:
        node.bias.add_(shift)


def kernel_refusal(node: nn.Module) -> str:
    """Why no values of a node fold to an arbitrary kernel; empty where some do."""
    return node.kernel_refusal() if isinstance(node, Node) else ''


def geometry(conv: nn.Conv2d) -> tuple[Sequence[int], ...]:
    """Kernel size, stride, padding and dilation of a convolution."""
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation


def as_kernel(weight: Tensor) -> Tensor:
    """A linear layer's weight as a 1x1 kernel; a kernel as it is."""
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Values of the output channels, shaped to broadcast over an output or a kernel."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def centred(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """A kernel with zeros around it, up to this height and width."""
    y, x = margins(size, kernel.shape[2:])
    return F.pad(kernel, (x, x, y, y)) if y or x else kernel


class PerChannel(Node):
    """A node whose output channels are multiplied by a number each: shape and costs."""

    @property
    def shape(self) -> Shape:
        """The node's."""
        return shape_of(self.node)

    def fold_macs(self) -> int:
        """One operation a value of the kernel."""
        out, inside, height, width = self.shape
        return out * inside * height * width + fold_macs(self.node)

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """The node's and one operation an output."""
        macs, size = apply_macs(self.node, size)
        return macs + self.shape[0] * size[0] * size[1], size
