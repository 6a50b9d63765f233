"""Factors: layers of torch that are nodes of an expression.

They stay ``nn.Conv2d`` and ``nn.Linear``, so that a framework's initialisation and its options
reach them. mmengine's initialisations compare the names of a class and of its direct bases only, so
that each class names torch's class and its base.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .algebra import Affine, as_kernel
from .compat import ConvNd, padding_by_side
from .geometry import geometry, output_size


class Factor(nn.Module):
    """The methods of ``Node`` for a layer, whose weight is its kernel."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return the kernel's shape ``(out, in / groups, kh, kw)``."""
        return tuple(as_kernel(self.weight).shape)

    def fold(self, dtype: torch.dtype, sample: object = None) -> Affine:
        """Return the kernel and bias in ``dtype``; a factor takes no statistics of a sample."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return as_kernel(self.weight).to(dtype), bias

    def fold_macs(self) -> int:
        """Return 0: nothing is folded."""
        return 0

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Return the operations of applying the layer to one image, and the output size."""
        return self.weight.numel() * size[0] * size[1], size

    def set_kernel(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Set the weight, and the bias if the layer has one."""
        self.weight.copy_(kernel.reshape(self.weight.shape))
        if self.bias is not None:
            self.bias.copy_(bias)

    def kernel_refusal(self) -> str:
        """Return '': the weight can be any kernel."""
        return ''

    def add_bias(self, shift: Tensor) -> None:
        """Shift the bias."""
        self.bias.add_(shift)


class LinearFactor(Factor, nn.Linear):
    """A linear layer as a factor."""


class ConvFactor(Factor, nn.Conv2d, ConvNd):
    """A convolution as a factor."""

    def apply_macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Return the operations of applying the convolution to one image, and the output size."""
        return super().apply_macs(output_size(size, *geometry(self)))


class SkippingFactor(ConvFactor, nn.Conv2d, ConvNd):
    """A strided 1x1 convolution, computed without a stride on the pixels that it sees.

    With less than eight channels in channels_last, oneDNN writes the gradient of a strided 1x1
    weight beyond its memory on a CPU (uxlfoundation/oneDNN#6035; seen with torch 2.9).
    """

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        y, x = self.stride
        seen = F.pad(input, padding_by_side(self))[..., ::y, ::x]
        return F.conv2d(seen, weight, bias, groups=self.groups)
