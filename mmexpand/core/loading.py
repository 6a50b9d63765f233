"""Loading of a layer's weight and bias into the unit in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UserValueError
from .expression import Norm, has_statistics

if TYPE_CHECKING:  # The layer imports this module.
    from .expanded_layer import ExpandedLayer


def note_loaded(
    unit: ExpandedLayer,
    state_dict: Mapping[str, Tensor],
    prefix: str,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Note the given weight and the anchored norms of a state dict of a unit."""
    if unit.given is not None and weight is not None and weight.shape == unit.spec.weight_shape:
        unit.given[:] = [(weight, bias)]
    for name, norm in unit.named_modules(prefix=prefix.rstrip('.')):
        if isinstance(norm, Norm):
            norm.is_anchored |= has_statistics(state_dict, f'{name}.norm.')


def load_compact(
    unit: ExpandedLayer,
    weight: Tensor | None,
    bias: Tensor | None,
    prefix: str,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Factorise a compact weight, or add an error if it is missing or does not fit.

    As in a layer of torch, a missing or unexpected bias is reported, and the weight is loaded.

    Args:
        unit: changed in place.
        weight: the weight of the state dict, if it has one.
        bias: the bias of the state dict, if it has one.
        prefix: the prefix of the unit's keys.
        strict: whether to report missing and unexpected keys.
        missing: the list of missing keys.
        unexpected: the list of unexpected keys.
        errors: the list of error messages.

    Raises:
        ValueError: if the rate or block makes it impossible.
    """
    spec = unit.spec
    shape = None if weight is None else tuple(weight.shape)
    if weight is None or shape != spec.weight_shape:
        found = 'factors of other shapes'
        if weight is not None:
            found = f'a weight of shape {shape} with{"out" * (bias is None)} bias'
        errors.append(
            f'size mismatch for {prefix}weight: the checkpoint holds {found}, the layer has '
            f'{spec.weight_shape} with{"out" * (not spec.bias)} bias'
        )
        return
    if (bias is None) == spec.bias:
        if strict:
            (missing if spec.bias else unexpected).append(f'{prefix}bias')
        with torch.no_grad():
            bias = unit.bias  # None if the layer has none.
    try:
        unit.set_weight(weight, bias)
    except UserValueError as error:
        raise UserValueError(
            f'{prefix.rstrip(".")}: a compact weight cannot be loaded into this expanded layer: '
            f'{error}; or start from the initialisation instead of the checkpoint'
        ) from None
