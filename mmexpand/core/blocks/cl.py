"""CL, for arbitrary kernels (Sec. 3.1), and FC, for linear layers (Sec. 3.2)."""

from torch import nn

from ..expression import Chain
from ..factorise import cl_refusal, factorise_cl
from ..layer_spec import LayerSpec


def cl(spec: LayerSpec) -> nn.Module:
    """Build W = W3 W2 W1: 1x1 (m -> rm), kxk (rm -> rn), 1x1 (rn -> n).

    The first factor has the padding: a padded kxk factor would see zeros at the border, where the
    layer implies the first factor's bias. The kxk factor has stride and dilation. For a linear
    layer all three factors are linear layers.
    """
    p, q = spec.widen_inputs(), spec.widen_outputs()
    factors = [
        spec.factor(spec.in_channels, p, pads=True),
        spec.factor(p, q, spec.kernel_size, strides=True),
        spec.factor(q, spec.out_channels),
    ]
    return Chain(factors, spec.groups, factorise_cl, cl_refusal)
