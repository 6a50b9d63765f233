"""The product of a 1x1, a kxk and a 1x1 factor, in few operations.

Folds multiply small matrices, so that the number of operations costs, not their size. The product
equals ``algebra.fold``'s. Product and gradient use matrices that are views of the factors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .algebra import Affine, fold_order
from .compat import parameters_of


class Saved(NamedTuple):
    """Values that the gradient requires.

    Attributes:
        half: the product of the first two or the last two factors.
        sums: the middle factor summed over its taps ``(q, p)``; None without biases.
        shift: bias of the first two factors' product ``(q,)``; None without biases.
    """

    half: Tensor
    sums: Tensor | None = None
    shift: Tensor | None = None


class ChainProduct:
    """The product of three factors, and its gradient.

    Args:
        factors: ``nn.Conv2d`` or ``nn.Linear`` for which ``fits`` is True: 1x1 (m -> p), kxk
            (p -> q) and 1x1 (q -> n).
    """

    def __init__(self, factors: Sequence[nn.Module]):
        first, middle, last = (factor.weight.detach() for factor in factors)
        self._shapes = first.shape, middle.shape, last.shape
        self._taps = (*middle.shape, 1, 1)[2:4]
        self._first, self._last = first.flatten(1), last.flatten(1)
        p, q = len(self._first), self._last.shape[1]
        # (q, taps, p) in memory.
        self._middle = middle.movedim(1, -1).reshape(q, -1, p)
        self._rows, self._columns = self._middle.view(-1, p), self._middle.view(q, -1)
        transposed = (self._first, self._last, self._rows, self._columns)
        self._first_t, self._last_t, self._rows_t, self._columns_t = (m.t() for m in transposed)
        biases = [None if factor.bias is None else factor.bias.detach() for factor in factors]
        self._biases = None if biases[0] is None else biases
        shapes = tuple((*w.shape, 1, 1)[:4] for w in (first, middle, last))
        self._first_two_first = fold_order(shapes, 0, 3)[1] == 2

    def multiply(self) -> tuple[Affine, Saved]:
        """Return the kernel ``(n, m, kh, kw)`` and bias ``(n,)``, and values for ``pull_back``."""
        if self._first_two_first:
            half = (self._rows @ self._first).view(len(self._columns), -1)
            product = self._last @ half
        else:
            half = self._last @ self._columns
            product = half.view(-1, len(self._first)) @ self._first
        kernel = _taps_last(product, len(self._last), self._first.shape[1], self._taps)
        if self._biases is None:
            return (kernel, None), Saved(half)
        # Every tap of the middle factor adds the first factor's bias.
        first, second, third = self._biases
        sums = self._middle.sum(1)
        shift = torch.addmv(second, sums, first)
        bias = torch.addmv(third, self._last, shift)
        return (kernel, bias), Saved(half, sums, shift)

    def pull_back(self, saved: Saved, kernel: Tensor, bias: Tensor | None) -> list[Tensor]:
        """Return the gradients of the factors' parameters, in the parameters' order.

        Args:
            saved: the values from ``multiply``.
            kernel: gradient of the kernel ``(n, m, kh, kw)``.
            bias: gradient of the bias ``(n,)``; None if the factors have no biases.
        """
        gradient = kernel.permute(0, 2, 3, 1)
        if self._first_two_first:
            gradient = gradient.reshape(len(self._last), -1)
            of_last = gradient @ saved.half.t()
            rows = (self._last_t @ gradient).view(-1, self._first.shape[1])
            of_middle = rows @ self._first_t
            of_first = self._rows_t @ rows
        else:
            gradient = gradient.reshape(-1, self._first.shape[1])
            of_first = saved.half.view(-1, len(self._first)).t() @ gradient
            half = (gradient @ self._first_t).view(len(self._last), -1)
            of_last = half @ self._columns_t
            of_middle = self._last_t @ half
        biases = []
        if bias is not None:
            of_shift = self._last_t @ bias
            of_last.addr_(bias, saved.shift)
            of_middle.view_as(self._middle).addcmul_(of_shift.view(-1, 1, 1), self._biases[0])
            biases = [saved.sums.t() @ of_shift, of_shift, bias]
        weights = [
            of_first.view(self._shapes[0]),
            self._as_middle(of_middle),
            of_last.view(self._shapes[2]),
        ]
        if not biases:
            return weights
        return [gradient for pair in zip(weights, biases, strict=True) for gradient in pair]

    def _as_middle(self, gradient: Tensor) -> Tensor:
        shape = self._shapes[1]
        if len(shape) == 2:
            return gradient.view(shape)
        return _taps_last(gradient, *shape[:2], self._taps)


def _taps_last(matrix: Tensor, out: int, inputs: int, taps: Sequence[int]) -> Tensor:
    """Return ``(out, kh, kw, inputs)`` in memory, viewed as a kernel ``(out, inputs, kh, kw)``."""
    height, width = taps
    strides = height * width * inputs, 1, width * inputs, inputs
    return matrix.as_strided((out, inputs, height, width), strides)


def memory(factors: Sequence[nn.Module]) -> tuple:
    """Return the factors' place in memory; a product is valid until it changes."""
    parameters = (p for factor in factors for p in factor.parameters(recurse=False))
    return tuple((p.data_ptr(), p.dtype, p.stride()) for p in parameters)


def fits(factors: Sequence[nn.Module]) -> bool:
    """Return whether ``ChainProduct`` can multiply these factors of one group."""
    plain = all(
        isinstance(factor, (nn.Conv2d, nn.Linear)) and 'weight' in parameters_of(factor)
        for factor in factors
    )
    if len(factors) != 3 or not plain:
        return False
    first, middle, last = (factor.weight for factor in factors)
    if any(w.dim() == 4 and w.shape[2:] != (1, 1) for w in (first, last)):
        return False
    matrices = first.flatten(1), middle.movedim(1, -1), last.flatten(1)
    wide = (torch.float32, torch.float64)
    return first.dtype in wide and all(
        m.is_contiguous() and m.dtype == first.dtype for m in matrices
    )
