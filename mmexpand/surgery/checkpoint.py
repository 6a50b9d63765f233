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
from ..core.blocks import BLOCKS
from ..core.expanded_layer import FACTORS, SITE_KEY
from ..core.expression import as_kernel
from ..core.site import Site

META_KEY = 'mmexpand'
"""Where a checkpoint's ``meta`` says what it is: ``dict(kind='expanded' or 'compact', ...)``."""

_FACTOR = re.compile(rf'(?:(?P<layer>.+)\.)?(?P<block>{FACTORS})\.\d+\.(?:weight|bias)')
_SITE = re.compile(rf'(?:(?P<layer>.+)\.)?(?P<block>{"|".join(BLOCKS)})\.{SITE_KEY}')


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
    """Whether a state dict holds expanded layers."""
    return any(_FACTOR.fullmatch(key) or _SITE.fullmatch(key) for key in state_dict)


def expanded_layers(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names of the expanded layers in a state dict, each with the shapes of what it holds."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    prefixes = _prefixes(state_dict)
    for key, value in state_dict.items():
        prefix = _prefix_of(key, prefixes)
        if prefix is not None:
            layer = prefix.rpartition('.')[0]
            inside = key.removeprefix(layer).removeprefix('.')
            layers.setdefault(layer, {})[inside] = tuple(value.shape)
    return layers


def contract_state_dict(state_dict: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Turn an expanded state dict into the compact one, without a model.

    The kernels of a chain say all that is needed: the product of their taps depends on nothing
    else than the groups, and these show in the channel counts of neighbouring factors. Any other
    block holds a few integers that it is built from again. A compact state dict comes back as it
    is.

    Args:
        state_dict: of an expanded model; it is not changed.

    Returns:
        The state dict of the compact model, products taken in float64, in the order of its keys.
    """
    compact: OrderedDict[str, Tensor] = OrderedDict()
    prefixes = _prefixes(state_dict)
    # A checkpoint of ours holds the folded weights too; the factors are what was trained.
    layers = {prefix.rpartition('.')[0] for prefix in prefixes}
    folded = {f'{layer}.{k}'.lstrip('.') for layer in layers for k in ('weight', 'bias')}
    for key, value in state_dict.items():
        prefix = _prefix_of(key, prefixes)
        if prefix is None:
            if key not in folded:
                compact[key] = value
            continue
        layer, _, block = prefix.rpartition('.')
        name = f'{layer}.' if layer else ''
        if f'{name}weight' not in compact:
            contract_layer = _contract_chain if block == FACTORS else _contract_block
            inside = {
                k.removeprefix(f'{prefix}.'): v
                for k, v in state_dict.items()
                if k.startswith(f'{prefix}.')
            }
            compact[f'{name}weight'], bias = contract_layer(inside, block)
            if bias is not None:
                compact[f'{name}bias'] = bias
    return compact


def _prefixes(state_dict: Mapping[str, Tensor]) -> set[str]:
    """Where in a state dict expressions are: 'LAYER.factors' or 'LAYER.BLOCK'."""
    matches = (_SITE.fullmatch(key) or _FACTOR.fullmatch(key) for key in state_dict)
    found = {f'{m["layer"]}.{m["block"]}' if m['layer'] else m['block'] for m in matches if m}
    # A chain inside another block's expression is part of that.
    return {p for p in found if not any(p.startswith(f'{other}.') for other in found)}


def _prefix_of(key: str, prefixes: set[str]) -> str | None:
    while key:
        key = key.rpartition('.')[0]
        if key in prefixes:
            return key
    return None


def _contract_chain(state_dict: Mapping[str, Tensor], _: str) -> tuple[Tensor, Tensor | None]:
    factors = []
    while f'{len(factors)}.weight' in state_dict:
        name = len(factors)
        weight, bias = state_dict[f'{name}.weight'], state_dict.get(f'{name}.bias')
        factors.append((as_kernel(weight.double()), None if bias is None else bias.double()))
    groups = len(factors[0][0]) // factors[1][0].shape[1]
    weight, bias = fold(factors, groups)
    like = state_dict['0.weight']
    weight = (weight[:, :, 0, 0] if like.dim() == 2 else weight).to(like.dtype).contiguous()
    return weight, None if bias is None else bias.to(like.dtype)


@torch.no_grad()
def _contract_block(state_dict: Mapping[str, Tensor], block: str) -> tuple[Tensor, Tensor | None]:
    like = next(value for value in state_dict.values() if value.is_floating_point())
    expression = BLOCKS[block].build(Site.from_record(state_dict[SITE_KEY], like))
    expression.load_state_dict({k: v for k, v in state_dict.items() if k != SITE_KEY})
    weight, bias = expression.fold(torch.float64)
    return weight.to(like.dtype).contiguous(), None if bias is None else bias.to(like.dtype)
