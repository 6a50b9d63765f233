"""OREPA: online convolutional re-parameterisation (Hu et al., CVPR 2022, Sec. 3 and Fig. 3)."""

import math

import torch
from torch import Tensor, nn

from ..expression import Chain, Deviation, Filter, Scale, Separable, Sum
from ..site import Site

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


def identity_kernel(conv: nn.Conv2d) -> Tensor:
    """The 1x1 kernel with which a convolution of as many outputs as inputs is the identity."""
    inside = conv.weight.shape[1]
    return torch.eye(inside).repeat(len(conv.weight) // inside, 1)[:, :, None, None]


def cosines(channels: int, kernel_size: tuple[int, int]) -> Tensor:
    """Filters ``(channels, kh, kw)``: the first half vary down the kernel, the others across."""
    half = channels // 2
    frequency = torch.cat((torch.arange(1, half + 1), torch.arange(1, channels - half + 1)))
    down, across = (
        torch.cos(math.pi * frequency[:, None] * (torch.arange(k) + 0.5) / k) for k in kernel_size
    )
    filters = across[:, None, :].repeat(1, kernel_size[0], 1)
    filters[:half] = down[:half, :, None]
    return filters


def refusal(site: Site) -> str:
    """Why smaller kernels cannot be centred in this one, or ''."""
    return site.not_odd()
