"""CL, for arbitrary kernels (Sec. 3.1), and FC, for linear layers (Sec. 3.2)."""

from torch import nn

from ..expression import Chain
from ..factorise import cl_refusal, factorise_cl
from ..site import Site


def cl(site: Site) -> nn.Module:
    """W = W3 W2 W1: 1x1 (m -> rm), kxk (rm -> rn), 1x1 (rn -> n).

    Padding sits on the first factor: padded, the kxk would see zeros where the layer implies the
    first one's bias. Stride and dilation sit on the kxk. Of a linear layer all three are linear.
    """
    p, q = site.widen_inputs(), site.widen_outputs()
    factors = [
        site.factor(site.in_channels, p, pads=True),
        site.factor(p, q, site.kernel_size, strides=True),
        site.factor(q, site.out_channels),
    ]
    return Chain(factors, site.groups, factorise_cl, cl_refusal)
