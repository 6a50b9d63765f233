"""The folded kernel as a parameter of its own, so that its gradient is what is reduced.

In distributed training the gradient of a folded kernel is as small as the compact layer's. The
network is run on parameters that hold the products; once their gradients are reduced, the factors'
gradients are computed from them locally. The product is linear in the reduced gradient, so the
result is the same as reducing the factors' gradients.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from .algebra import Affine

if TYPE_CHECKING:
    from .expanded_layer import ExpandedLayer


class FoldedParameter:
    """The folded kernel of a unit, cut off from the factors until ``deliver``.

    Attributes:
        weight: the folded kernel as the network sees it.
        bias: the folded bias, or None.
    """

    def __init__(self, unit: 'ExpandedLayer'):
        self._unit = unit
        self._folded: Affine | None = None
        with torch.no_grad():
            weight, bias = unit.kernel.get()
        self.weight = nn.Parameter(weight.clone())
        self.bias = None if bias is None else nn.Parameter(bias.clone())

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight and, where there is one, bias."""
        return [parameter for parameter in (self.weight, self.bias) if parameter is not None]

    def refresh(self) -> Affine:
        """The parameters, holding the fold of the present factors.

        They are written again when a factor has changed, and only then: writing them between a
        forward and its backward would spoil the gradient.
        """
        self._unit.take_offered()
        with torch.enable_grad():
            folded = self._unit.kernel.get()
        if folded is not self._folded:
            self._folded = folded
            with torch.no_grad():
                for parameter, value in zip(self.parameters, self._values(), strict=True):
                    parameter.copy_(value)
        return self.weight, self.bias

    def deliver(self) -> None:
        """Turn the parameters' gradients into the factors', adding to what those have."""
        if all(parameter.grad is None for parameter in self.parameters):
            return
        if self._folded is None:
            self.refresh()
        pairs = [
            (value, parameter.grad)
            for value, parameter in zip(self._values(), self.parameters, strict=True)
            if parameter.grad is not None and value.requires_grad
        ]
        trained = [p for p in self._unit.expression.parameters() if p.requires_grad]
        values, gradients = zip(*pairs, strict=True)
        torch.autograd.backward(values, gradients, inputs=trained)
        for parameter in self.parameters:
            parameter.grad = None

    def _values(self) -> list[torch.Tensor]:
        return [value for value in self._folded if value is not None]
