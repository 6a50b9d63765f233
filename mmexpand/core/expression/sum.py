"""Branches beside each other."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..algebra import Affine
from ..batch_sample import BatchSample
from ..layer_spec import margins
from .node import (
    Node,
    Shape,
    add_bias,
    apply_macs,
    centred,
    fold_node,
    kernel_refusal,
    set_kernel,
    shape_of,
)
from .norm import fold_inner, fold_measured, is_measured


class Sum(nn.ModuleList, Node):
    """Branches added up; kernels are centred and padded with zeros to the first one's size.

    Args:
        nodes: the branches; the first has the largest kernel, and takes what is set.
        padding: zeros that the first branch pads with, by axis: a smaller kernel that would have
            to pad with less than none crops the image.
        dilation: of the kernel, by axis.
    """

    def __init__(
        self, nodes: Sequence[nn.Module], padding: tuple[int, int], dilation: tuple[int, int]
    ):
        super().__init__(nodes)
        self._crops = [
            tuple(max(0, m * d - p) for m, p, d in zip(margin, padding, dilation, strict=True))
            for margin in (margins(self.shape[2:], shape_of(node)[2:]) for node in self)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Add up the branches' outputs."""
        outputs = [
            node(x[..., y : x.shape[-2] - y, z : x.shape[-1] - z] if y or z else x)
            for node, (y, z) in zip(self, self._crops, strict=True)
        ]
        return sum(outputs[1:], outputs[0])

    @property
    def shape(self) -> Shape:
        """The first branch's."""
        return shape_of(self[0])

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """The sum of kernels and of biases."""
        measured = [] if sample is None else [node for node in self if is_measured(node)]
        if measured:
            fold_inner(measured, dtype, sample)
        folded = [fold_node(node, dtype, sample) for node in self if node not in measured]
        if measured:
            folded.insert(0, fold_measured(measured, self.shape[2:], dtype, sample))
        return self._add(folded)

    def _add(self, terms: Sequence[Affine]) -> Affine:
        weights, biases = zip(*terms, strict=True)
        weights = [centred(weight, self.shape[2:]) for weight in weights]
        biases = [bias for bias in biases if bias is not None]
        return sum(weights[1:], weights[0]), sum(biases[1:], biases[0]) if biases else None

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Operations of all branches."""
        total, result = 0, size
        for index, (node, crop) in enumerate(zip(self, self._crops, strict=True)):
            macs, out = apply_macs(node, tuple(s - 2 * c for s, c in zip(size, crop, strict=True)))
            total += macs
            result = result if index else out
        return total, result

    def set_kernel(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Give the first branch what the others leave."""
        others = [fold_node(node, kernel.dtype) for node in list(self)[1:]]
        negative = [(-weight, None if bias is None else -bias) for weight, bias in others]
        set_kernel(self[0], *self._add([(kernel, bias), *negative]))

    def kernel_refusal(self) -> str:
        """The first branch's."""
        return kernel_refusal(self[0])

    def add_bias(self, shift: Tensor) -> None:
        """Shift the first branch's."""
        add_bias(self[0], shift)
