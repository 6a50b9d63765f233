"""DO-Conv: depthwise over-parameterised convolution (Cao et al., 2020, "DO-Conv", Sec. 3)."""

import torch
from torch import Tensor, nn

from ..expression import Deviation, Separable
from ..layer_spec import LayerSpec


class DepthwiseOver(Separable):
    """W' = W (I + D): D mixes the taps of every input channel, and starts at 0."""

    def set_kernel(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Set D to 0, and W to the kernel."""
        self.depthwise.weight.zero_()
        self.pointwise.set_kernel(kernel.flatten(1), bias)

    def kernel_refusal(self) -> str:
        """Return '': with D = 0, W can be any kernel."""
        return ''


def do(spec: LayerSpec) -> nn.Module:
    """Build W' = W (I + D), D ``(m, kh kw, kh kw)``: a depthwise factor of kh kw filters, a 1x1."""
    taps = spec.kernel_size[0] * spec.kernel_size[1]
    m, wide = spec.in_channels, spec.in_channels * taps
    depthwise = spec.factor(m, wide, spec.kernel_size, True, True, bias=False, groups=m)
    eye = torch.eye(taps).view(taps, 1, *spec.kernel_size).repeat(m, 1, 1, 1)
    pointwise = spec.factor(wide, spec.out_channels)
    # The 1x1 factor has as many inputs per output as the kxk convolution, so that torch's
    # initialisation gives it the same values.
    return DepthwiseOver(Deviation(depthwise, eye), pointwise, taps, spec.groups)


def refusal(spec: LayerSpec) -> str:
    """Return the reason why the kernel has no taps to mix, or ''."""
    return 'its kernel is 1x1' if tuple(spec.kernel_size) == (1, 1) else ''
