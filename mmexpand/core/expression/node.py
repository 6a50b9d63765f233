"""The base class of nodes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..algebra import Affine
from ..batch_sample import BatchSample
from ..geometry import margins

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
        return sum(node.fold_macs() for node in self.children())

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
        return f'a {type(self).__name__} cannot be set to a kernel'

    def add_bias(self, shift: Tensor) -> None:
        """Shift the bias to which the node folds; only for nodes with a bias."""
        raise NotImplementedError


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Return values of output channels ``(out,)``, shaped to broadcast over an output or kernel."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def centred(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """Return the kernel padded with zeros to this height and width."""
    y, x = margins(size, kernel.shape[2:])
    return F.pad(kernel, (x, x, y, y)) if y or x else kernel


class PerChannel(Node):
    """A node whose output channels are scaled: its shape, costs and refusal."""

    @property
    def shape(self) -> Shape:
        """Return the node's shape."""
        return self.node.shape

    def fold_macs(self) -> int:
        """Return the node's operations plus one per value of the kernel."""
        out, inside, height, width = self.shape
        return out * inside * height * width + self.node.fold_macs()

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Return the node's operations plus one per output value, and the output size."""
        macs, size = self.node.apply_macs(size)
        return macs + self.shape[0] * size[0] * size[1], size

    def kernel_refusal(self) -> str:
        """Return the node's reason, or ''."""
        return self.node.kernel_refusal()
