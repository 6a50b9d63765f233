"""Chains: nodes applied one after another."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..algebra import Affine, as_kernel, compose, fold, fold_order, kernel_size
from ..batch_sample import BatchSample
from .node import (
    Node,
    Shape,
    Solve,
)


class Chain(nn.ModuleList, Node):
    """Nodes applied one after another. The kernel is their product (Eq. 1).

    Args:
        nodes: the nodes, in the order of application.
        groups: the number of groups of all nodes.
        solve: returns factors with a given product; None: the chain cannot be set to a kernel.
        refuse: returns the reason why ``solve`` fails for factors of these shapes, or ''; None: it
            never fails.
    """

    def __init__(
        self,
        nodes: Sequence[nn.Module],
        groups: int,
        solve: Solve | None = None,
        refuse: Callable[[list[Shape], int], str] | None = None,
    ):
        super().__init__(nodes)
        self.groups = groups
        self._solve = solve
        self._refuse = refuse

    def forward(self, x: Tensor) -> Tensor:
        """Apply one node after another."""
        for node in self:
            x = node(x)
        return x

    @property
    def shapes(self) -> list[Shape]:
        """Return the kernel shapes of the nodes."""
        return [node.shape for node in self]

    @property
    def shape(self) -> Shape:
        """Return the product's shape."""
        shapes = self.shapes
        return (shapes[-1][0], shapes[0][1], *kernel_size(shapes))

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """Return the product, multiplied in the cheapest order."""
        factors = [node.fold(dtype, sample) for node in self]
        if sample is not None and len(factors) == 2:  # The first bias has no gradient.
            return compose(*factors, self.groups)
        return fold(factors, self.groups)

    def fold_macs(self) -> int:
        """Return the operations of the products, in the cheapest order."""
        per_group = tuple((out // self.groups, *rest) for out, *rest in self.shapes)
        product = self.groups * fold_order(per_group, 0, len(self))[0]
        return product + sum(node.fold_macs() for node in self)

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Return the operations of all nodes, and the output size."""
        total = 0
        for node in self:
            macs, size = node.apply_macs(size)
            total += macs
        return total, size

    def set_kernel(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Solve for the factors; set all biases but the last to zero."""
        present = [as_kernel(factor.weight) for factor in self]
        new = self._solve(kernel, present, self.groups)
        for factor, value in zip(self, new, strict=True):
            factor.weight.copy_(value.view_as(factor.weight))
            if factor.bias is not None:
                factor.bias.zero_()
        if self[-1].bias is not None:
            self[-1].bias.copy_(bias)

    def kernel_refusal(self) -> str:
        """Return the reason why the factors are too narrow for an arbitrary kernel, or ''."""
        if self._solve is None:
            return super().kernel_refusal()
        return self._refuse(self.shapes, self.groups) if self._refuse else ''

    def add_bias(self, shift: Tensor) -> None:
        """Shift the last node's bias."""
        self[-1].add_bias(shift)
