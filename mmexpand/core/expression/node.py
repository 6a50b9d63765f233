"""The base class of nodes, and functions that accept both nodes and factors."""

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
"""A function (kernel, present factors, groups) -> factors in float64 with this product."""


class Node(nn.Module):
    """A part of an expression that is not a factor."""

    @property
    def shape(self) -> Shape:
        """Return the kernel's shape ``(out, in / groups, kh, kw)``."""
        raise NotImplementedError

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """Return the kernel and bias, computed in ``dtype``; differentiable.

        Args:
            dtype: the dtype of the computation.
            sample: the batch sample from which norms take statistics; None: running statistics.

        Returns:
            The kernel ``(out, in / groups, kh, kw)`` and the bias ``(out,)`` or None.
        """
        raise NotImplementedError

    def fold_macs(self) -> int:
        """Return the multiply-accumulate operations of folding."""
        return sum(fold_macs(node) for node in self.children())

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Return the operations of applying it layer by layer to one image, and the output size."""
        raise NotImplementedError

    def set_kernel(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Set values that fold to this kernel and bias, up to rounding.

        The caller checks first that ``kernel_refusal`` returns ''.
        """
        raise NotImplementedError

    def kernel_refusal(self) -> str:
        """Return the reason why no values fold to an arbitrary kernel, or ''."""
        return ''

    def add_bias(self, shift: Tensor) -> None:
        """Shift the bias to which the node folds; only for nodes with a bias."""
        raise NotImplementedError


def fold_node(node: nn.Module, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
    """Return the kernel and bias of a node or a factor, computed in ``dtype``."""
    if isinstance(node, Node):
        return node.fold(dtype, sample)
    bias = None if node.bias is None else node.bias.to(dtype)
    return as_kernel(node.weight).to(dtype), bias


def shape_of(node: nn.Module) -> Shape:
    """Return the kernel's shape of a node or a factor."""
    return node.shape if isinstance(node, Node) else tuple(as_kernel(node.weight).shape)


def fold_macs(node: nn.Module) -> int:
    """Return the multiply-accumulate operations of folding a node; 0 for a factor."""
    return node.fold_macs() if isinstance(node, Node) else 0


def apply_macs(node: nn.Module, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Return the operations of applying a node or a factor to one image, and the output size."""
    if isinstance(node, Node):
        return node.apply_macs(size)
    if isinstance(node, nn.Conv2d):
        size = output_size(size, *geometry(node))
    return node.weight.numel() * size[0] * size[1], size


def set_kernel(node: nn.Module, kernel: Tensor, bias: Tensor | None) -> None:
    """Set the kernel and bias of a node or a factor."""
    if isinstance(node, Node):
        node.set_kernel(kernel, bias)
        return
    node.weight.copy_(kernel.reshape(node.weight.shape))
    if node.bias is not None:
        node.bias.copy_(bias)


def add_bias(node: nn.Module, shift: Tensor) -> None:
    """Shift the bias of a node or a factor that has a bias."""
    if isinstance(node, Node):
        node.add_bias(shift)
    else:
        node.bias.add_(shift)


def kernel_refusal(node: nn.Module) -> str:
    """Return the reason why no values of a node fold to an arbitrary kernel, or ''."""
    return node.kernel_refusal() if isinstance(node, Node) else ''


def geometry(conv: nn.Conv2d) -> tuple[Sequence[int], ...]:
    """Return kernel size, stride, padding and dilation of a convolution."""
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation


def as_kernel(weight: Tensor) -> Tensor:
    """Return a linear layer's weight as a 1x1 kernel, or a kernel unchanged."""
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Return values of output channels ``(out,)``, shaped to broadcast over an output or kernel."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def centred(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """Return the kernel padded with zeros to this height and width."""
    y, x = margins(size, kernel.shape[2:])
    return F.pad(kernel, (x, x, y, y)) if y or x else kernel


class PerChannel(Node):
    """A node whose output channels are scaled: its shape and costs."""

    @property
    def shape(self) -> Shape:
        """Return the node's shape."""
        return shape_of(self.node)

    def fold_macs(self) -> int:
        """Return the node's operations plus one per value of the kernel."""
        out, inside, height, width = self.shape
        return out * inside * height * width + fold_macs(self.node)

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Return the node's operations plus one per output value, and the output size."""
        macs, size = apply_macs(self.node, size)
        return macs + self.shape[0] * size[0] * size[1], size
