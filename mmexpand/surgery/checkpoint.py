"""Checkpoints on disk: expanded to compact without a model, safe loading, whole saving."""

import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..core.algebra import fold

META_KEY = 'mmexpand'
"""Where a checkpoint's ``meta`` says what it is: ``dict(kind='expanded' or 'compact', ...)``."""

_FACTOR = re.compile(r'(?:(?P<layer>.+)\.)?factors\.(?P<index>\d+)\.(?P<kind>weight|bias)')


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and the way out."""


def load_checkpoint(path: str | os.PathLike, map_location: str = 'cpu') -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Args:
        path: the file.
        map_location: where its tensors go.

    Raises:
        CheckpointError: if the file is missing, truncated, corrupt, or holds more than tensors
            and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'{path}: no such checkpoint')
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        blocked = re.search(r'GLOBAL (\S+)', str(error))
        if blocked is None:
            raise _unreadable(path) from error
        raise CheckpointError(
            f'{path} holds a {blocked[1]}, which is no weight: loading it could run code. If you '
            f'trust the file, save its state_dict alone and use that'
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise _unreadable(path) from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{path} holds a {type(checkpoint).__name__}, not a checkpoint')
    return checkpoint


def _unreadable(path: Path) -> CheckpointError:
    size = path.stat().st_size
    return CheckpointError(
        f'{path} ({size} bytes) is truncated, corrupt, or no PyTorch checkpoint; use an older one'
    )


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write a checkpoint whole or not at all: under a temporary name, then renamed."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def get_state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The weights in a checkpoint: its ``state_dict``, or itself where it is a bare one."""
    return checkpoint.get('state_dict', checkpoint)


def is_expanded_state_dict(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether a state dict holds factors."""
    return any(_FACTOR.fullmatch(key) for key in state_dict)


def expanded_layers(state_dict: Mapping[str, Tensor]) -> dict[str, list[tuple[int, ...]]]:
    """Names of the expanded layers in a state dict, each with its factors' weight shapes."""
    layers: dict[str, list[tuple[int, ...]]] = {}
    for key, value in state_dict.items():
        match = _FACTOR.fullmatch(key)
        if match and match['kind'] == 'weight':
            layers.setdefault(match['layer'] or '', []).append(tuple(value.shape))
    return layers


def contract_state_dict(state_dict: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Turn an expanded state dict into the compact one, without a model.

    Shapes say all that is needed: the product of the kernels' taps depends on nothing else than
    the groups, and these show in the channel counts of neighbouring factors. A compact state
    dict comes back as it is.

    Args:
        state_dict: of an expanded model; it is not changed.

    Returns:
        The state dict of the compact model, products taken in float64, in the order of its keys.
    """
    compact: OrderedDict[str, Tensor] = OrderedDict()
    for key, value in state_dict.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            compact[key] = value
            continue
        prefix = f'{match["layer"]}.' if match['layer'] else ''
        if f'{prefix}weight' not in compact:
            weight, bias = _contract_layer(state_dict, prefix)
            compact[f'{prefix}weight'] = weight
            if bias is not None:
                compact[f'{prefix}bias'] = bias
    return compact


def _contract_layer(state_dict: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor | None]:
    factors = []
    while f'{prefix}factors.{len(factors)}.weight' in state_dict:
        name = f'{prefix}factors.{len(factors)}'
        weight, bias = state_dict[f'{name}.weight'], state_dict.get(f'{name}.bias')
        factors.append((weight.double(), None if bias is None else bias.double()))
    linear = factors[0][0].dim() == 2
    if linear:
        factors = [(weight[:, :, None, None], bias) for weight, bias in factors]
    groups = len(factors[0][0]) // factors[1][0].shape[1]
    weight, bias = fold(factors, groups)
    dtype = state_dict[f'{prefix}factors.0.weight'].dtype
    weight = (weight[:, :, 0, 0] if linear else weight).to(dtype).contiguous()
    return weight, None if bias is None else bias.to(dtype)
