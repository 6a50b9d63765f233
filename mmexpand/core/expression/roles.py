"""Roles of parameters, which the optimizer's options distinguish."""

from torch import nn

from .chain import Chain
from .norm import Norm
from .parts import Scale, Separable

ROLES = ('outer', 'inner', 'scale')
"""Roles of parameters: of a chain's factors around the one with the layer's taps; of that one, and
of branches by themselves; and of scales and norms."""


def parameter_roles(node: nn.Module, role: str = 'inner', prefix: str = '') -> dict[str, str]:
    """Return the role of every parameter of an expression, by its name in it.

    Args:
        node: the expression, or a part of it.
        role: of factors that are the part by themselves.
        prefix: of the names.
    """
    own = 'scale' if isinstance(node, Scale) else role
    roles = {f'{prefix}{key}': own for key, _ in node.named_parameters(recurse=False)}
    for name, child in node.named_children():
        # The second factor of a chain is the one that 'preserve' solves for.
        outer = isinstance(node, Chain) and name != '1'
        outer |= isinstance(node, Separable) and name == 'depthwise'
        # By place, not by class: frameworks convert norms to their own.
        scales = isinstance(node, Norm) and name == 'norm'
        inside = 'scale' if scales else 'outer' if outer else role
        roles |= parameter_roles(child, inside, f'{prefix}{name}.')
    return roles
