"""Blocks with batch norms in their branches: nonlinear in training mode, linear in eval mode."""

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
    # Norms shift only if the layer has a bias: see ``Norm``.
    floored = spec.is_depthwise or any(isinstance(branch, Identity) for branch in branches)
    norms = [Norm(branch, spec.bias, floored) for branch in branches]
    return Sum(norms, spec.padding, spec.dilation)


def behind_norm(build: Callable[[LayerSpec], nn.Module], spec: LayerSpec) -> nn.Module:
    """Build BN(block), a linear block with a batch norm behind its kernel: ``norm=True``."""
    # The norm has the bias. Without a bias in front, the padding is zero before every factor.
    return Norm(build(replace(spec, bias=False)), spec.bias, spec.is_depthwise)


def bn(spec: LayerSpec) -> nn.Module:
    """Build BN(W), the layer with a batch norm behind it: the control for blocks with norms.

    A gain of another block over this block is a gain of its branches, not of the norm.
    """
    return behind_norm(LayerSpec.conv, spec)


def repvgg(spec: LayerSpec) -> nn.Module:
    """Build BN(W_kxk) + BN(W_1x1) + BN(I) (Ding et al., "RepVGG", CVPR 2021, Sec. 3.2).

    With ``main`` the kxk branch is a chain: BN(W3 W2 W1) for 'cl', BN(Wl ... W1) for 'ck'. The norm
    sets the scale of the chain, whatever its start. The paper's chain has no such norm.
    """
    plain = spec.branch(spec.kernel_size)
    main = {None: LayerSpec.conv, 'cl': cl.cl, 'ck': ck.ck}[spec.options.main]
    return _sum(spec, [main(plain), *small_branches(plain)])


def qarepvgg(spec: LayerSpec) -> nn.Module:
    """Build BN(BN(W_kxk) + W_1x1 + I).

    Chu et al., "Make RepVGG Greater Again", AAAI 2024, Sec. 3.3. The identity has no norm, because
    a channel that is dead behind a ReLU has no variance to divide by.
    """
    first, *small = rep_branches(spec.branch(spec.kernel_size))
    branches = [Norm(first, spec.bias, spec.is_depthwise), *small]
    return Norm(Sum(branches, spec.padding, spec.dilation), spec.bias, spec.is_depthwise)


def mobileone(spec: LayerSpec) -> nn.Module:
    """Build the sum of r branches BN(W_kxk), BN(W_1x1) and BN(I).

    Vasu et al., "MobileOne", CVPR 2023, Sec. 3.2. In a 1x1 layer the r branches are 1x1 already, so
    that the additional 1x1 is left out.
    """
    plain = spec.branch(spec.kernel_size)
    branches = [plain.conv() for _ in range(max(1, round(spec.rate)))]
    small = small_branches(plain)
    return _sum(spec, [*branches, *(small[1:] if spec.kernel_size == (1, 1) else small)])


def mobileone_refusal(spec: LayerSpec) -> str:
    """Return the reason why a 1x1 kernel cannot be centred in this kernel, or ''."""
    return '' if spec.kernel_size == (1, 1) else spec.not_odd()


def acnet(spec: LayerSpec) -> nn.Module:
    """Build BN(W_kxk) + BN(W_1xk) + BN(W_kx1) (Ding et al., "ACNet", ICCV 2019, Sec. 3.3)."""
    return _sum(spec, ac_branches(spec.branch(spec.kernel_size)))


def dbb(spec: LayerSpec) -> nn.Module:
    """Build BN(W_kxk) + BN(W_1x1) + BN(W_kxk BN(I + D)) + BN(avg BN(W_1x1)).

    Ding et al., "Diverse Branch Block", CVPR 2021, Sec. 3.3 and Fig. 2. In branches with two layers
    the first layer pads, and its norm sees the padded pixels too. This makes merging exact at the
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
