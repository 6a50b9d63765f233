"""Linear variants of RepVGG and ACNet: the same branches, with scales in the place of norms."""

from torch import nn

from ..expression import Identity, Scale, Sum
from ..layer_spec import LayerSpec


def small_branches(spec: LayerSpec) -> list[nn.Module]:
    """Return RepVGG's 1x1 branch and, if in = out, its identity."""
    one = spec.branch((1, 1)).conv()
    same = spec.in_channels == spec.out_channels
    return [one, *([Identity(one)] if same else [])]


def rep_branches(spec: LayerSpec) -> list[nn.Module]:
    """Return RepVGG's kxk, 1x1 and, if in = out, identity (Ding et al., CVPR 2021, Sec. 3.2)."""
    small = small_branches(spec)
    return [spec.conv(spec.bias), *small]


def ac_branches(spec: LayerSpec) -> list[nn.Module]:
    """Return ACNet's kxk, 1xk and kx1 branches (Ding et al., ICCV 2019, Sec. 3.3)."""
    height, width = spec.kernel_size
    return [spec.conv(spec.bias), *(spec.branch(k).conv() for k in ((1, width), (height, 1)))]


def rep(spec: LayerSpec) -> nn.Module:
    """Build W = s1 W_kxk + s2 W_1x1 + s3 I; the scales ``(n,)`` start at 1."""
    branches = [Scale(branch, 1.0) for branch in rep_branches(spec)]
    return Sum(branches, spec.padding, spec.dilation)


def ac(spec: LayerSpec) -> nn.Module:
    """Build W = s1 W_kxk + s2 W_1xk + s3 W_kx1; the scales ``(n,)`` start at 1."""
    branches = [Scale(branch, 1.0) for branch in ac_branches(spec)]
    return Sum(branches, spec.padding, spec.dilation)
