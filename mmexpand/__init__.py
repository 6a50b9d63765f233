"""ExpandNets (Guo, Alvarez, Salzmann, NeurIPS 2020) for OpenMMLab.

With mmengine installed, importing mmexpand registers its hooks, builders and networks with
OpenMMLab's registries. Expansion, contraction and verification require torch only.
"""

from importlib.util import find_spec

from .core import ExpandedConv2d, ExpandedConvTranspose2d, ExpandedLinear
from .core.blocks import register_block
from .stack import check_stack
from .surgery import (
    ExpandConfig,
    LayerPlan,
    Plan,
    contract,
    contract_,
    expand_,
    is_expanded,
    plan,
    verify,
)
from .version import __version__

check_stack()
if find_spec('mmengine'):
    from . import mm  # noqa: F401

__all__ = [
    'ExpandConfig',
    'ExpandedConv2d',
    'ExpandedConvTranspose2d',
    'ExpandedLinear',
    'LayerPlan',
    'Plan',
    '__version__',
    'contract',
    'contract_',
    'expand_',
    'is_expanded',
    'plan',
    'register_block',
    'verify',
]
