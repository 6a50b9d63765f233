"""CK, for kernels larger than 3x3 (Sec. 3.2)."""

from itertools import pairwise

from torch import nn

from ..expression import Chain
from ..factorise import ck_refusal, factorise_ck
from ..layer_spec import LayerSpec


def ck(spec: LayerSpec) -> nn.Module:
    """Build W = Wl ... W2 W1, l = (k - 1) / 2 factors of 3x3: m -> rm -> rn ... rn -> n.

    The first factor has the padding, the last factor the stride, and all factors the dilation.
    """
    length = (spec.kernel_size[0] - 1) // 2
    inner = [spec.widen_inputs(), *[spec.widen_outputs()] * (length - 2)]
    channels = [spec.in_channels, *inner, spec.out_channels]
    factors = [
        spec.factor(a, b, (3, 3), pads=index == 0, strides=index == length - 1)
        for index, (a, b) in enumerate(pairwise(channels))
    ]
    return Chain(factors, spec.groups, factorise_ck, ck_refusal)


def refusal(spec: LayerSpec) -> str:
    """Return the reason why a chain of 3x3 factors cannot replace this kernel, or ''."""
    height, width = spec.kernel_size
    if height != width:
        return f'its kernel is not square ({height}x{width})'
    if height % 2 == 0:
        return f'its kernel is even ({height}x{width})'
    return f'its kernel is {height}x{width}' if height <= 3 else ''
