"""Sums of branches."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..algebra import Affine
from ..batch_sample import BatchSample
from ..geometry import margins
from .node import (
    Node,
    Shape,
    centred,
)
from .norm import alike, fold_inner, fold_measured, is_measured


class Sum(nn.ModuleList, Node):
    """The sum of branches. Smaller kernels are padded with zeros to the first branch's size.

    Args:
        nodes: the branches. The first has the largest kernel, and ``set_kernel`` changes only it.
        padding: the first branch's zero padding by axis. A branch whose padding would be negative
            crops the image instead.
        dilation: the kernel's dilation by axis.
    """

    def __init__(
        self, nodes: Sequence[nn.Module], padding: tuple[int, int], dilation: tuple[int, int]
    ):
        super().__init__(nodes)
        self._crops = [
            tuple(max(0, m * d - p) for m, p, d in zip(margin, padding, dilation, strict=True))
            for margin in (margins(self.shape[2:], node.shape[2:]) for node in self)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the branches' outputs."""
        outputs = [
            node(x[..., y : x.shape[-2] - y, z : x.shape[-1] - z] if y or z else x)
            for node, (y, z) in zip(self, self._crops, strict=True)
        ]
        return sum(outputs[1:], outputs[0])

    @property
    def shape(self) -> Shape:
        """Return the first branch's shape."""
        return self[0].shape

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """Return the sum of the kernels and the sum of the biases."""
        measured = [] if sample is None else [node for node in self if is_measured(node)]
        if not alike(measured):
            measured = []  # Each is folded by itself.
        if measured:
            fold_inner(measured, dtype, sample)
        folded = [node.fold(dtype, sample) for node in self if node not in measured]
        if measured:
            folded.insert(0, fold_measured(measured, self.shape[2:], dtype, sample))
        return self._add(folded)

    def _add(self, terms: Sequence[Affine]) -> Affine:
        weights, biases = zip(*terms, strict=True)
        weights = [centred(weight, self.shape[2:]) for weight in weights]
        biases = [bias for bias in biases if bias is not None]
        return sum(weights[1:], weights[0]), sum(biases[1:], biases[0]) if biases else None

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Return the operations of all branches, and the output size."""
        total, result = 0, size
        for index, (node, crop) in enumerate(zip(self, self._crops, strict=True)):
            macs, out = node.apply_macs(tuple(s - 2 * c for s, c in zip(size, crop, strict=True)))
            total += macs
            result = result if index else out
        return total, result

    def set_kernel(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Set the first branch to the difference between this kernel and the other branches."""
        others = [node.fold(kernel.dtype) for node in list(self)[1:]]
        negative = [(-weight, None if bias is None else -bias) for weight, bias in others]
        self[0].set_kernel(*self._add([(kernel, bias), *negative]))

    def kernel_refusal(self) -> str:
        """Return the first branch's reason, or ''."""
        return self[0].kernel_refusal()

    def add_bias(self, shift: Tensor) -> None:
        """Shift the first branch's bias."""
        self[0].add_bias(shift)
