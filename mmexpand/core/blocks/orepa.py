"""OREPA: online convolutional re-parameterisation (Hu et al., CVPR 2022, Sec. 3 and Fig. 3)."""

import torch
from torch import Tensor, nn

from ..expression import Chain, Deviation, Filter, Scale, Separable, Sum
from ..site import Site
from .filters import cosines, identity_kernel

EXPANSION = 8
"""Depthwise filters of every input channel in the last branch."""


def orepa(site: Site) -> nn.Module:
    """W = .25 W_kxk + .25 avg W_1x1 + 0 dct W_1x1 + .5 W_kxk (I + D) + 1 W_1x1 + .5 W_1x1 W_dw.

    The numbers are where the scales (n) start. D, m -> m, starts at 0; dct is a fixed cosine for
    every output channel.
    """
    m, n, k = site.in_channels, site.out_channels, site.kernel_size
    first, one = site.branch(k), site.branch((1, 1)).conv()
    taps = k[0] * k[1]

    def filtered(filters: Tensor) -> nn.Module:
        node = first.factor(m, n, pads=True)
        return Filter(node, filters, site.stride, site.dilation)

    inner = first.factor(m, m, pads=True)
    deviation = Deviation(inner, identity_kernel(inner))
    wide = m * EXPANSION
    depthwise = first.factor(m, wide, k, True, True, groups=m)
    branches = [
        Scale(site.conv(site.bias), 0.25),
        Scale(filtered(torch.full((1, *k), 1 / taps)), 0.25),
        Scale(filtered(cosines(n, k)), 0.0),
        Scale(Chain([deviation, first.factor(m, n, k, strides=True)], site.groups), 0.5),
        Scale(one, 1.0),
        Scale(Separable(depthwise, first.factor(wide, n), EXPANSION, site.groups), 0.5),
    ]
    return Sum(branches, site.padding, site.dilation)
