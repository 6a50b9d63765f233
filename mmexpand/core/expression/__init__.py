"""A unit's kernel as an expression of linear parts: factor, chain, sum, scale, filter, norm.

Every node is a module with a kernel ``(out, in / groups, kh, kw)``. It defines how to fold it
(``fold``), how to apply it layer by layer (``forward``), the costs of both (``fold_macs``,
``apply_macs``), and how to set its kernel (``set_kernel``). Factors have the same methods: see
``core/factor.py``.
"""

from .chain import Chain
from .node import (
    Node,
    Shape,
)
from .norm import Norm, has_statistics
from .parts import Deviation, Filter, Identity, Scale, Separable, factors_of
from .roles import ROLES, parameter_roles
from .sum import Sum

__all__ = [
    'ROLES',
    'Chain',
    'Deviation',
    'Filter',
    'Identity',
    'Node',
    'Norm',
    'Scale',
    'Separable',
    'Shape',
    'Sum',
    'factors_of',
    'has_statistics',
    'parameter_roles',
]
