"""Blocks with batch norms in their branches: not linear while training, exact in eval mode."""

import torch
from torch import nn

from ..expression import Chain, Deviation, Filter, Norm, Sum
from ..site import Site
from .filters import identity_kernel
from .rep import ac_branches, rep_branches


def _sum(site: Site, branches: list[nn.Module]) -> nn.Module:
    # A norm has a shift of its own where the layer has a bias.
    return Sum([Norm(branch, site.bias) for branch in branches], site.padding, site.dilation)


def repvgg(site: Site) -> nn.Module:
    """BN(W_kxk) + BN(W_1x1) + BN(I) (Ding et al., "RepVGG", CVPR 2021, Sec. 3.2)."""
    return _sum(site, rep_branches(site.branch(site.kernel_size)))


def acnet(site: Site) -> nn.Module:
    """BN(W_kxk) + BN(W_1xk) + BN(W_kx1) (Ding et al., "ACNet", ICCV 2019, Sec. 3.3)."""
    return _sum(site, ac_branches(site.branch(site.kernel_size)))


def dbb(site: Site) -> nn.Module:
    """BN(W_kxk) + BN(W_1x1) + BN(W_kxk BN(I + D)) + BN(avg BN(W_1x1)).

    Ding et al., "Diverse Branch Block", CVPR 2021, Sec. 3.3 and Fig. 2. Where a branch has two
    layers the first one pads, and its norm sees the padded pixels too: so merging is exact at the
    border.
    """
    plain = site.branch(site.kernel_size)
    m, n, k = site.in_channels, site.out_channels, site.kernel_size
    inner = plain.factor(m, m, pads=True)
    deviation = Norm(Deviation(inner, identity_kernel(inner)), site.bias)
    average = torch.full((1, *k), 1 / (k[0] * k[1]))
    first = Norm(plain.factor(m, n, pads=True), site.bias)
    return _sum(
        site,
        [
            plain.conv(),
            site.branch((1, 1)).conv(),
            Chain([deviation, plain.factor(m, n, k, strides=True)], site.groups),
            Filter(first, average, site.stride, site.dilation),
        ],
    )


def refusal(site: Site) -> str:
    """Why smaller kernels cannot be centred in this one, or ''."""
    return site.not_odd()
