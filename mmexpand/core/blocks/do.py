"""DO-Conv: depthwise over-parameterised convolution (Cao et al., 2020, "DO-Conv", Sec. 3)."""

import torch
from torch import Tensor, nn

from ..expression import Deviation, Separable, set_kernel
from ..layer_spec import LayerSpec


class DepthwiseOver(Separable):
    """W' = W (I + D): for every input channel a mixture of its taps; D starts at 0."""

    def set_kernel(self, kernel: Tensor, bias: Tensor | None) -> None:
        """D = 0 and W the kernel."""
        self.depthwise.weight.zero_()
        set_kernel(self.pointwise, kernel.flatten(1), bias)

    def kernel_refusal(self) -> str:
        """None: W is the kernel."""
        return ''


def do(spec: LayerSpec) -> nn.Module:
    """W' = W (I + D), D (m, kh kw, kh kw): a depthwise factor of kh kw filters, then a 1x1."""
    taps = spec.kernel_size[0] * spec.kernel_size[1]
    m, wide = spec.in_channels, spec.in_channels * taps
    depthwise = spec.factor(m, wide, spec.kernel_size, True, True, bias=False, groups=m)
    eye = torch.eye(taps).view(taps, 1, *spec.kernel_size).repeat(m, 1, 1, 1)
    pointwise = spec.factor(wide, spec.out_channels)
    # What a convolution of this kernel starts with, not what a wide 1x1 does: the same here.
    return DepthwiseOver(Deviation(depthwise, eye), pointwise, taps, spec.groups)


def refusal(spec: LayerSpec) -> str:
    """Why there are no taps to mix, or ''."""
    return 'its kernel is 1x1' if tuple(spec.kernel_size) == (1, 1) else ''
