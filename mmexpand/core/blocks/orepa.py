"""OREPA: online convolutional re-parameterisation (Hu et al., CVPR 2022, Sec. 3 and Fig. 3)."""

import torch
from torch import Tensor, nn

from ..expression import Chain, Deviation, Filter, Scale, Separable, Sum
from ..layer_spec import LayerSpec
from .filters import cosines, identity_kernel

EXPANSION = 8
"""Number of depthwise filters per input channel in the last branch."""


def orepa(spec: LayerSpec) -> nn.Module:
    """Build the sum of six scaled branches.

    W = .25 W_kxk + .25 avg W_1x1 + 0 dct W_1x1 + .5 W_kxk (I + D) + 1 W_1x1 + .5 W_1x1 W_dw.
    The numbers are the first values of the scales ``(n,)``. D, m -> m, starts at 0; dct is a fixed
    cosine for every output channel.
    """
    m, n, k = spec.in_channels, spec.out_channels, spec.kernel_size
    first, one = spec.branch(k), spec.branch((1, 1)).conv()
    taps = k[0] * k[1]

    def filtered(filters: Tensor) -> nn.Module:
        node = first.factor(m, n, pads=True)
        return Filter(node, filters, spec.stride, spec.dilation)

    inner = first.factor(m, m, pads=True)
    deviation = Deviation(inner, identity_kernel(inner))
    wide = m * EXPANSION
    depthwise = first.factor(m, wide, k, True, True, groups=m)
    branches = [
        Scale(spec.conv(spec.bias), 0.25),
        Scale(filtered(torch.full((1, *k), 1 / taps)), 0.25),
        Scale(filtered(cosines(n, k)), 0.0),
        Scale(Chain([deviation, first.factor(m, n, k, strides=True)], spec.groups), 0.5),
        Scale(one, 1.0),
        Scale(Separable(depthwise, first.factor(wide, n), EXPANSION, spec.groups), 0.5),
    ]
    return Sum(branches, spec.padding, spec.dilation)
