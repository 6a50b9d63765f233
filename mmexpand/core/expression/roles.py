"""Roles of parameters, for the optimizer's options."""

from torch import nn

from .chain import Chain
from .norm import Norm
from .parts import Scale, Separable

ROLES = ('outer', 'inner', 'scale')
"""Roles of parameters.

- 'outer': a chain's factors except the second, and depthwise factors of ``Separable``
- 'inner': all other factors
- 'scale': scales and norms
"""


def parameter_roles(node: nn.Module, role: str = 'inner', prefix: str = '') -> dict[str, str]:
    """Return the role of every parameter of an expression, by parameter name.

    Args:
        node: the expression, or a part of it.
        role: the role of factors outside of chains.
        prefix: the prefix of the names.
    """
    own = 'scale' if isinstance(node, Scale) else role
    roles = {f'{prefix}{key}': own for key, _ in node.named_parameters(recurse=False)}
    for name, child in node.named_children():
        # 'preserve' solves for the second factor of a chain.
        outer = isinstance(node, Chain) and name != '1'
        outer |= isinstance(node, Separable) and name == 'depthwise'
        # Found by place and not by class, because frameworks convert norms to their own classes.
        scales = isinstance(node, Norm) and name == 'norm'
        inside = 'scale' if scales else 'outer' if outer else role
        roles |= parameter_roles(child, inside, f'{prefix}{name}.')
    return roles
