"""Folded parameters: DDP reduces their gradients in the place of the factors'.

The gradient of a folded kernel is as small as the compact layer's. The network runs on parameters
that hold the folded kernels. When their gradients are reduced, each process computes the factors'
gradients from them. The factors' gradients are linear in the kernel's, so that the result equals
reducing the factors' gradients.
"""

from collections.abc import Callable

import torch
from torch import nn

from .algebra import Affine
from .folded import FoldedKernel


class FoldedParameter:
    """The folded kernel of a unit as a parameter, without a graph to the factors.

    Attributes:
        weight: the folded kernel ``(out, in / groups, kh, kw)``, in the network's memory format.
        bias: the folded bias ``(out,)`` or None.

    Args:
        kernel: the folded kernel of the unit.
        take_offered: the unit's method, which is called before the factors are folded.
    """

    def __init__(self, kernel: FoldedKernel, take_offered: Callable[[], None]):
        self._kernel, self._take_offered = kernel, take_offered
        self._folded: Affine | None = None
        self._awaits_backward = False
        with torch.no_grad():
            weight, bias = kernel.get()
        self.weight = nn.Parameter(weight.clone())
        self.bias = None if bias is None else nn.Parameter(bias.clone())

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the weight and, if the layer has a bias, the bias."""
        return [parameter for parameter in (self.weight, self.bias) if parameter is not None]

    def refresh(self) -> Affine:
        """Return the parameters, with the fold of the present factors.

        They are written only if a factor has changed, because writing them between a forward and
        its backward pass would spoil the gradient. A change of mode or a step of another optimizer
        in between folds the same factors again.
        """
        self._take_offered()
        with torch.enable_grad():
            folded = self._kernel.get()
        if folded is not self._folded:
            self._folded = folded
            with torch.no_grad():
                for parameter, value in zip(self.parameters, self._values(), strict=True):
                    if not (self._awaits_backward and torch.equal(parameter, value)):
                        parameter.copy_(value)
        self._awaits_backward = True
        return self.weight, self.bias

    def deliver(self) -> None:
        """Compute the factors' gradients from the parameters', and add them to ``.grad``."""
        self._awaits_backward = False
        if all(parameter.grad is None for parameter in self.parameters):
            return
        if self._folded is None:
            self.refresh()
        pairs = [
            (value, parameter.grad)
            for value, parameter in zip(self._values(), self.parameters, strict=True)
            if parameter.grad is not None and value.requires_grad
        ]
        trained = [p for p in self._kernel.parameters() if p.requires_grad]
        if pairs:
            values, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(values, gradients, inputs=trained)
        for parameter in self.parameters:
            parameter.grad = None

    def _values(self) -> list[torch.Tensor]:
        return [value for value in self._folded if value is not None]
