"""The linear skeletons of RepVGG and ACNet: their branches, with scales in the place of norms."""

from torch import nn

from ..expression import Identity, Scale, Sum
from ..site import Site


def small_branches(site: Site) -> list[nn.Module]:
    """RepVGG's 1x1 and, where in = out, identity."""
    one = site.branch((1, 1)).conv()
    same = site.in_channels == site.out_channels
    return [one, *([Identity(one)] if same else [])]


def rep_branches(site: Site) -> list[nn.Module]:
    """RepVGG's kxk, 1x1 and, where in = out, identity (Ding et al., CVPR 2021, Sec. 3.2)."""
    small = small_branches(site)
    return [site.conv(site.bias), *small]


def ac_branches(site: Site) -> list[nn.Module]:
    """ACNet's kxk, 1xk and kx1 (Ding et al., ICCV 2019, Sec. 3.3)."""
    height, width = site.kernel_size
    return [site.conv(site.bias), *(site.branch(k).conv() for k in ((1, width), (height, 1)))]


def rep(site: Site) -> nn.Module:
    """W = s1 W_kxk + s2 W_1x1 + s3 I, the scales (n) starting at 1."""
    branches = [Scale(branch, 1.0) for branch in rep_branches(site)]
    return Sum(branches, site.padding, site.dilation)


def ac(site: Site) -> nn.Module:
    """W = s1 W_kxk + s2 W_1xk + s3 W_kx1, the scales (n) starting at 1."""
    branches = [Scale(branch, 1.0) for branch in ac_branches(site)]
    return Sum(branches, site.padding, site.dilation)
