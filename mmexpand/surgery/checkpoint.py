"""Checkpoints on disk: expanded to compact without a model, safe loading, whole saving."""

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

from ..core.algebra import fold, transpose
from ..core.blocks import BLOCKS
from ..core.blocks.upgrade import upgrade
from ..core.expanded_layer import FACTORS, SITE_KEY
from ..core.expression import as_kernel
from ..core.site import Site
from ..errors import UserError, UserTypeError
from ..files import written_whole
from ..stack import check_installed

META_KEY = 'mmexpand'
"""Where a checkpoint's ``meta`` says what it is: ``dict(kind='expanded' or 'compact', ...)``."""
WEIGHTS_ONLY = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
"""Where set in the environment, ``torch.load`` runs no code, whatever its caller asks for."""

_FACTOR = re.compile(rf'(?:(?P<layer>.+)\.)?(?P<block>{FACTORS})\.\d+\.(?:weight|bias)')
_SITE = re.compile(rf'(?:(?P<layer>.+)\.)?(?P<block>\w+)\.{SITE_KEY}')


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be used; the message names the file and the way out."""


def load_checkpoint(path: str | os.PathLike, map_location: str = 'cpu') -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Args:
        path: the file.
        map_location: where its tensors go.

    Raises:
        CheckpointError: see ``load_file``; also if the file holds no weights.
    """
    checkpoint = load_file(path, map_location)
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{path} holds a {type(checkpoint).__name__}, not a checkpoint')
    state_dict = get_state_dict(checkpoint)
    weights = isinstance(state_dict, Mapping) and all(isinstance(key, str) for key in state_dict)
    if not weights or not any(isinstance(value, Tensor) for value in state_dict.values()):
        keys = ', '.join(map(str, [*checkpoint][:5])) or '(none)'
        raise CheckpointError(
            f'{path} holds no weights, neither as state_dict nor by itself; its keys are {keys}'
        )
    return checkpoint


def load_file(path: str | os.PathLike, map_location: str = 'cpu') -> Any:
    """Read what torch has saved, without running code from it.

    Args:
        path: the file.
        map_location: where its tensors go.

    Raises:
        CheckpointError: if the file is missing, truncated, corrupt, not torch's, or holds more
            than tensors, plain values and what else is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'{path}: no such checkpoint')
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # A malformed file can make the unpickler raise anything.
        blocked = describe_blocked(error)
        raise CheckpointError(f'{path} {blocked}' if blocked else _unreadable(path)) from error


def describe_blocked(error: Exception) -> str:
    """What ``torch.load(weights_only=True)`` has blocked, and what to do; '' if nothing."""
    text = str(error)
    found = re.search(r'GLOBAL (\S+)', text)
    refused = re.search(r'refused: (.+)|call reduce for unrecognized function (.+)', text)
    built = re.search(r"but got <class '(.+?)'>", text)
    if found:
        what = f'holds a {found[1]}, which is no weight'
    elif refused:
        what = f'asks for {refused[1] or refused[2]}, which no weight needs'
    elif built and isinstance(error, UnpicklingError):
        what = f'builds a {built[1]}, which is no weight'
    elif 'TorchScript' in text:
        what = 'is a TorchScript archive'
    else:
        return ''
    return (
        f'{what}: loading it could run code. If you trust the file, save its state_dict alone '
        'and use that'
    )


def _unreadable(path: Path) -> str:
    with open(path, 'rb') as file:
        start = file.read(512)
    if start.lstrip().startswith(b'<'):
        return f'{path} is a web page, not a checkpoint: download it again'
    if path.suffix == '.safetensors':
        return f'{path} is no PyTorch checkpoint; use the .pth file beside it'
    size = path.stat().st_size
    return f'{path} ({size} bytes) is truncated, corrupt or of another kind; use an older one'


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write a checkpoint whole or not at all: under a temporary name, then renamed."""
    with written_whole(path) as temporary:
        torch.save(checkpoint, temporary)


def save_safetensors(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, Any]
) -> None:
    """Write weights as a safetensors file, whole or not at all.

    Args:
        state_dict: of a compact model; tensors that share memory are written once for each name.
        path: the file.
        metadata: of the file: plain values, of which those that are no strings become JSON.

    Raises:
        ImportError: if safetensors is missing.
        TypeError: if the state dict holds something else than tensors.
    """
    check_installed('a .safetensors file', 'safetensors')
    from safetensors.torch import save_file

    others = [key for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if others:
        raise UserTypeError(f'{others[0]} is no tensor, and safetensors holds nothing else')
    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in state_dict.items()
    }
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    texts['format'] = 'pt'  # What other readers look for.
    with written_whole(path) as temporary:
        save_file(tensors, temporary, texts)


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
    state_dict = dict(state_dict)
    like = next(value for value in state_dict.values() if value.is_floating_point())
    site = Site.from_record(state_dict[SITE_KEY], like)
    expression = BLOCKS[block].build(site)
    upgrade(expression, state_dict, '', SITE_KEY)
    expression.load_state_dict({k: v for k, v in state_dict.items() if k != SITE_KEY})
    weight, bias = expression.fold(torch.float64)
    weight = transpose(weight, site.groups) if site.upsampling else weight
    return weight.to(like.dtype).contiguous(), None if bias is None else bias.to(like.dtype)
