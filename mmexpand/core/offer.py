"""Offers: writable copies of a unit's weight and bias, for initialisations before the first use."""

import torch
from torch import Tensor


class Offer:
    """A writable weight and bias, which detects whether they were written.

    Attributes:
        weight: the weight, in the shape of the layer's.
        bias: the bias, in the shape of the layer's, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        self._before = weight.clone(), None if bias is None else bias.clone()

    @property
    def weight_was_written(self) -> bool:
        """Return whether the weight has changed."""
        return not torch.equal(self.weight, self._before[0])

    @property
    def was_written(self) -> bool:
        """Return whether the weight or the bias has changed."""
        return self.weight_was_written or self.bias_was_written

    @property
    def bias_was_written(self) -> bool:
        """Return whether the layer has a bias that has changed."""
        return self.bias is not None and not torch.equal(self.bias, self._before[1])
