"""Roles of parameters, which the optimizer's options distinguish."""

from torch import nn

from .chain import Chain
from .norm import Norm
from .parts import Scale, Separable

ROLES = ('outer', 'inner', 'scale')
"""Roles of parameters: of a chain's factors around the one with the layer's taps; of that one, and
of branches by themselves; and of scales and norms."""


def parameter_roles(expression: nn.Module) -> dict[str, str]:
    """The role of every parameter of an expression, by its name in it."""
    roles = {}
    # By place, not by class: frameworks convert norms to their own.
    scales = {m.norm if isinstance(m, Norm) else m for m in expression.modules() if _scales(m)}
    for name, module in expression.named_modules():
        for key, _ in module.named_parameters(recurse=False):
            path = f'{name}.{key}'.lstrip('.')
            roles[path] = 'scale' if module in scales else 'inner'
    for name, module in expression.named_modules():
        if isinstance(module, Chain):
            # The second factor is the one that 'preserve' solves for.
            prefix = f'{name}.'.lstrip('.')
            for index in range(len(module)):
                for path in roles:
                    if index != 1 and path.startswith(f'{prefix}{index}.'):
                        roles[path] = 'outer' if roles[path] == 'inner' else roles[path]
        elif isinstance(module, Separable):
            for path in roles:
                if path.startswith(f'{name}.depthwise.'.lstrip('.')):
                    roles[path] = 'outer'
    return roles


def _scales(node: nn.Module) -> bool:
    return isinstance(node, (Scale, Norm))
