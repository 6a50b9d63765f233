"""The sum of a chain and a per-channel identity: ``shortcut=True``.

Sources: collapsible linear blocks (SESR) add a fixed identity to the chain, and
Expansion-Squeeze-Blocks add an identity to ExpandNets. The scales are learnt, without weight decay.
"""

from torch import nn

from ..expression import Identity, Scale, Sum
from ..layer_spec import LayerSpec


def with_shortcut(chain: nn.Module, spec: LayerSpec) -> nn.Module:
    """Build W = beta chain + alpha delta, with scales ``(n,)``; delta is a 1x1 if in != out."""
    one = spec.branch((1, 1)).conv()
    same = spec.in_channels == spec.out_channels
    branches = [Scale(chain, 1.0), Scale(Identity(one) if same else one, 1.0)]
    return Sum(branches, spec.padding, spec.dilation)
