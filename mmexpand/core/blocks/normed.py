"""Blocks with batch norms in their branches: not linear while training, exact in eval mode."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from ..expression import Chain, Deviation, Filter, Identity, Norm, Sum
from ..layer_spec import LayerSpec
from . import ck, cl
from .filters import identity_kernel
from .rep import ac_branches, rep_branches, small_branches


def _sum(spec: LayerSpec, branches: list[nn.Module]) -> nn.Module:
    # A norm has a shift of its own where the layer has a bias.
    floored = spec.is_depthwise or any(isinstance(branch, Identity) for branch in branches)
    norms = [Norm(branch, spec.bias, floored) for branch in branches]
    return Sum(norms, spec.padding, spec.dilation)


def behind_norm(build: Callable[[LayerSpec], nn.Module], spec: LayerSpec) -> nn.Module:
    """BN(block): a linear block with a batch norm behind its kernel: ``norm=True``."""
    # The norm has the bias: what a block without one pads is zero, in front of every factor.
    return Norm(build(replace(spec, bias=False)), spec.bias, spec.is_depthwise)


def bn(spec: LayerSpec) -> nn.Module:
    """BN(W): the layer with a batch norm behind it, the control of blocks with norms in branches.

    A layer with such a norm is merged as exactly as a block is; what a block gains beyond it, its
    branches have gained.
    """
    return behind_norm(LayerSpec.conv, spec)


def repvgg(spec: LayerSpec) -> nn.Module:
    """BN(W_kxk) + BN(W_1x1) + BN(I) (Ding et al., "RepVGG", CVPR 2021, Sec. 3.2).

    With ``main`` the kxk branch is a chain: BN(W3 W2 W1) of 'cl', BN(3x3 after 3x3 ...) of 'ck'.
    However the chain starts, its norm sets its scale; the paper's chain alone has none.
    """
    plain = spec.branch(spec.kernel_size)
    main = {None: LayerSpec.conv, 'cl': cl.cl, 'ck': ck.ck}[spec.options.main]
    return _sum(spec, [main(plain), *small_branches(plain)])


def qarepvgg(spec: LayerSpec) -> nn.Module:
    """BN(BN(W_kxk) + W_1x1 + I) (Chu et al., "Make RepVGG Greater Again", AAAI 2024, Sec. 3.3).

    A channel that is dead behind a ReLU has no variance for a norm of the identity to divide by.
    """
    first, *small = rep_branches(spec.branch(spec.kernel_size))
    branches = [Norm(first, spec.bias, spec.is_depthwise), *small]
    return Norm(Sum(branches, spec.padding, spec.dilation), spec.bias, spec.is_depthwise)


def mobileone(spec: LayerSpec) -> nn.Module:
    """BN(W_kxk), r of them, + BN(W_1x1) + BN(I) (Vasu et al., "MobileOne", CVPR 2023, Sec. 3.2).

    Of a 1x1 layer, which is one of the r already, the last 1x1 is left out.
    """
    plain = spec.branch(spec.kernel_size)
    branches = [plain.conv() for _ in range(max(1, round(spec.rate)))]
    small = small_branches(plain)
    return _sum(spec, [*branches, *(small[1:] if spec.kernel_size == (1, 1) else small)])


def mobileone_refusal(spec: LayerSpec) -> str:
    """Why smaller kernels cannot be centred in this one, which a 1x1 needs none of, or ''."""
    return '' if spec.kernel_size == (1, 1) else spec.not_odd()


def acnet(spec: LayerSpec) -> nn.Module:
    """BN(W_kxk) + BN(W_1xk) + BN(W_kx1) (Ding et al., "ACNet", ICCV 2019, Sec. 3.3)."""
    return _sum(spec, ac_branches(spec.branch(spec.kernel_size)))


def dbb(spec: LayerSpec) -> nn.Module:
    """BN(W_kxk) + BN(W_1x1) + BN(W_kxk BN(I + D)) + BN(avg BN(W_1x1)).

    Ding et al., "Diverse Branch Block", CVPR 2021, Sec. 3.3 and Fig. 2. Where a branch has two
    layers the first one pads, and its norm sees the padded pixels too: so merging is exact at the
    border.
    """
    plain = spec.branch(spec.kernel_size)
    m, n, k = spec.in_channels, spec.out_channels, spec.kernel_size
    inner = plain.factor(m, m, pads=True)
    deviation = Norm(Deviation(inner, identity_kernel(inner)), spec.bias, floored=True)
    average = torch.full((1, *k), 1 / (k[0] * k[1]))
    first = Norm(plain.factor(m, n, pads=True), spec.bias, floored=True)
    return _sum(
        spec,
        [
            plain.conv(),
            spec.branch((1, 1)).conv(),
            Chain([deviation, plain.factor(m, n, k, strides=True)], spec.groups),
            Filter(first, average, spec.stride, spec.dilation),
        ],
    )
