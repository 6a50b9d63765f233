"""Planning, expansion, contraction and verification of whole models."""

from .config import ExpandConfig
from .copying import copy_model
from .expand import (
    compact_looks,
    contract,
    contract_,
    expand_,
    is_expanded,
    named_units,
    names_of_units,
)
from .layer_plan import LayerPlan, SkippedLayer
from .plan import Plan, plan
from .verify import Verification, VerificationError, verify

__all__ = [
    'ExpandConfig',
    'LayerPlan',
    'Plan',
    'SkippedLayer',
    'Verification',
    'VerificationError',
    'compact_looks',
    'contract',
    'contract_',
    'copy_model',
    'expand_',
    'is_expanded',
    'named_units',
    'names_of_units',
    'plan',
    'verify',
]
