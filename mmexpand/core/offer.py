"""A weight that an initialisation may write to before a unit is first used."""

import torch
from torch import Tensor


class Offer:
    """A weight and bias that a unit lets be written to, and whether they were.

    Attributes:
        weight: in the shape of the layer's.
        bias: in the shape of the layer's, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        self._before = weight.clone(), None if bias is None else bias.clone()

    @property
    def weight_was_written(self) -> bool:
        """Whether the weight is another one."""
        return not torch.equal(self.weight, self._before[0])

    @property
    def bias_was_written(self) -> bool:
        """Whether there is a bias, and it is another one."""
        return self.bias is not None and not torch.equal(self.bias, self._before[1])
