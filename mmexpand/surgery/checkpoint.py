"""Checkpoint files: safe loading, atomic saving, and contraction without a model."""

import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..core.algebra import as_kernel, fold
from ..core.blocks import build_expression
from ..core.expanded_layer import FACTORS
from ..core.layer_spec import SPEC_KEY, LayerSpec
from ..errors import UserError, UserTypeError
from ..files import written_whole
from ..stack import check_installed
from .compat import copy_versions

META_KEY = 'mmexpand'
"""Key of mmexpand's entry in a checkpoint's meta: ``dict(kind='expanded' or 'compact', ...)``."""
WEIGHTS_ONLY = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
"""Environment variable that makes every ``torch.load`` run no code from a file."""

_FACTOR = re.compile(rf'(?:(?P<layer>.+)\.)?(?P<block>{FACTORS})\.\d+\.(?:weight|bias)')
_SITE = re.compile(rf'(?:(?P<layer>.+)\.)?(?P<block>\w+)\.{SPEC_KEY}')


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be used; the message names the file and the fix."""


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running code from it.

    Raises:
        CheckpointError: see ``load_file``; also if the file holds no weights.
    """
    checkpoint = load_file(path)
    if not isinstance(checkpoint, Mapping):
        kind = type(checkpoint).__name__
        raise CheckpointError(f'{path} holds a {kind}, not a checkpoint; use a saved state dict')
    state_dict = get_state_dict(checkpoint)
    weights = isinstance(state_dict, Mapping) and all(isinstance(key, str) for key in state_dict)
    if not weights or not any(isinstance(value, Tensor) for value in state_dict.values()):
        keys = ', '.join(map(str, [*checkpoint][:5])) or '(none)'
        raise CheckpointError(
            f'{path} holds no weights, neither under state_dict nor at its top level; its keys are '
            f'{keys}; use a checkpoint of a model'
        )
    return checkpoint


def load_file(path: str | os.PathLike) -> Any:
    """Read a file of ``torch.save`` onto the CPU, without running code from it.

    Raises:
        CheckpointError: if the file is missing, truncated, corrupt or of another format, or holds
            more than tensors, plain values and allowed types.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'{path}: no such checkpoint; name an existing file')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # A malformed file can make the unpickler raise anything.
        blocked = describe_blocked(error)
        raise CheckpointError(f'{path} {blocked}' if blocked else _unreadable(path)) from error


def describe_blocked(error: Exception) -> str:
    """Return the object that ``torch.load(weights_only=True)`` has blocked, and the fix, or ''."""
    text = str(error)
    found = re.search(r'GLOBAL (\S+)', text)
    refused = re.search(r'refused: (.+)|call reduce for unrecognized function (.+)', text)
    built = re.search(r"but got <class '(.+?)'>", text)
    if found:
        what = f'holds a {found[1]}, which is not a weight'
    elif refused:
        what = f'requires {refused[1] or refused[2]}, which weights do not require'
    elif built and isinstance(error, UnpicklingError):
        what = f'holds a {built[1]}, which is not a weight'
    elif 'TorchScript' in text:
        what = 'is a TorchScript archive'
    else:
        return ''
    return (
        f'{what}: loading it could run code. If you trust the file, save only its state_dict and '
        'use the new file'
    )


def _unreadable(path: Path) -> str:
    with open(path, 'rb') as file:
        start = file.read(512)
    if start.lstrip().startswith(b'<'):
        return f'{path} is a web page, not a checkpoint: download it again'
    if path.suffix == '.safetensors':
        return f'{path} is not a PyTorch checkpoint; use the .pth file beside it'
    size = path.stat().st_size
    return f'{path} ({size} bytes) is truncated, corrupt or not a checkpoint; use an older file'


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write a checkpoint; the file is replaced only when it is complete."""
    with written_whole(path) as temporary:
        torch.save(checkpoint, temporary)


def save_safetensors(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, Any]
) -> None:
    """Write weights as a safetensors file, which is replaced only when it is complete.

    Args:
        state_dict: state dict of a compact model; shared tensors are written once for each name.
        path: the file.
        metadata: metadata of the file in plain values; all but strings become JSON.

    Raises:
        ImportError: if safetensors is missing.
        TypeError: if a value of the state dict is not a tensor.
    """
    check_installed('a .safetensors file', 'safetensors')
    from safetensors.torch import save_file

    others = [key for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if others:
        raise UserTypeError(
            f'{others[0]} is a {type(state_dict[others[0]]).__name__}, but safetensors holds '
            'tensors only; use the .pth file'
        )
    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in state_dict.items()
    }
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    texts['format'] = 'pt'  # Other readers require it.
    with written_whole(path) as temporary:
        save_file(tensors, temporary, texts)


def get_state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return the weights in a checkpoint, which is either a state dict or has a ``state_dict``."""
    return checkpoint.get('state_dict', checkpoint)


def is_expanded_state_dict(state_dict: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict holds expanded layers."""
    return any(_FACTOR.fullmatch(key) or _SITE.fullmatch(key) for key in state_dict)


def expanded_layers(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of the tensors of the expanded layers in a state dict, by layer and key."""
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
    """Contract an expanded state dict, without a model.

    The kernels of a chain suffice: their product depends only on the groups, which follow from
    the channels of neighbouring factors. Other blocks store a few integers from which they are
    built again. A compact state dict is returned as it is.

    Args:
        state_dict: state dict of an expanded model, which is not changed.

    Returns:
        The state dict of the compact model, with kernels folded in float64, in the same order.
    """
    compact: OrderedDict[str, Tensor] = OrderedDict()
    copy_versions(state_dict, compact)
    prefixes = _prefixes(state_dict)
    # Expanded checkpoints also hold folded weights, which are rounded; fold the factors instead.
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
            weight, bias = contract_layer(inside, block)
            dtype = next(v.dtype for v in inside.values() if v.is_floating_point())
            compact[f'{name}weight'] = weight.to(dtype).contiguous()
            if bias is not None:
                compact[f'{name}bias'] = bias.to(dtype)
    return compact


def _prefixes(state_dict: Mapping[str, Tensor]) -> set[str]:
    """Return the prefixes of expressions in a state dict: 'LAYER.factors' or 'LAYER.BLOCK'."""
    matches = (_SITE.fullmatch(key) or _FACTOR.fullmatch(key) for key in state_dict)
    found = {f'{m["layer"]}.{m["block"]}' if m['layer'] else m['block'] for m in matches if m}
    # A chain inside another block's expression is not a layer of its own.
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
    return weight[:, :, 0, 0] if state_dict['0.weight'].dim() == 2 else weight, bias


@torch.no_grad()
def _contract_block(state_dict: Mapping[str, Tensor], block: str) -> tuple[Tensor, Tensor | None]:
    like = next(value for value in state_dict.values() if value.is_floating_point())
    spec = LayerSpec.from_record(state_dict[SPEC_KEY], like)
    expression = build_expression(block, spec)
    try:
        expression.load_state_dict({k: v for k, v in state_dict.items() if k != SPEC_KEY})
    except RuntimeError as error:
        raise CheckpointError(
            f'the factors of a layer with block {block!r} are unknown: the checkpoint is of an '
            'unsupported version of mmexpand; contract it with that version'
        ) from error
    weight, bias = expression.fold(torch.float64)
    return spec.turn(weight), bias
