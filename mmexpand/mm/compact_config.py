"""The config of the compact network: the user's config without mmexpand's parts."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict

from ..errors import UserTypeError
from ..models import __all__ as models
from .optim import OPTIONS, ExpandOptimWrapperConstructor

HOOKS = ('ExpandHook', 'ContractHook', 'DistillHook', 'GradientConfusionHook', 'QuantHook')
CONSTRUCTOR = ExpandOptimWrapperConstructor.__name__
CPU_WRAPPER = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
"""The wrapper that ``prepare_cpu`` sets."""
BUILDERS = {'ExpandBackbone': 'backbone', 'ExpandModel': 'model'}
TYPES = frozenset(models)
"""Types of mmexpand: a compact config that names one of these still imports mmexpand."""
WRAPPERS = {**BUILDERS, 'CorruptLabels': 'dataset'}
"""Wrapper types and the key that holds the wrapped config."""


def make_compact_config(cfg: Config) -> Config:
    """Return a config without hooks, builders and options of mmexpand.

    Builders and ``CorruptLabels`` are replaced by the config they wrap. ``custom_imports`` of
    mmexpand is removed unless the network itself is mmexpand's. The result neither resumes nor
    loads weights, and has no work dir, in which mmengine would overwrite it. Classes of a
    pure-Python config become strings, as in mmengine's own dump.

    Args:
        cfg: the config that was trained; it is not changed.

    Returns:
        A config from which stock mmdet, mmsegmentation or mmpretrain builds the compact network.

    Raises:
        TypeError: if a value cannot be written to a file, naming its key.
    """
    compact = _unwrap(ConfigDict(plain(cfg.to_dict(), '')))
    _drop_hooks(compact)
    _drop_constructor(compact.get('optim_wrapper') or {})
    if not any(type_name(node) in TYPES for node in dicts(compact)):
        _drop_import(compact)
    wrapper = compact.get('model_wrapper_cfg') or {}
    if {k: v for k, v in wrapper.items() if k != 'find_unused_parameters'} == CPU_WRAPPER:
        del compact['model_wrapper_cfg']
    if compact.get('default_scope', '') is None:
        del compact['default_scope']  # mmseg's init_model requires a string.
    compact.update(resume=False, load_from=None)
    compact.pop('work_dir', None)
    if 'launcher' in compact:
        compact['launcher'] = 'none'
    return Config(compact)


def type_name(node: Any) -> str | None:
    """Return the ``type`` of a config node without its scope, or None."""
    kind = node.get('type') if isinstance(node, Mapping) else None
    if isinstance(kind, str):
        return kind.rpartition('.')[2]
    return getattr(kind, '__name__', None)


def hook_configs(cfg: Mapping) -> list[Any]:
    """Return the default and custom hooks of a config."""
    return [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or ())]


def _drop_hooks(compact: ConfigDict) -> None:
    default, custom = compact.get('default_hooks') or {}, compact.pop('custom_hooks', None) or ()
    for name in [name for name, hook in default.items() if type_name(hook) in HOOKS]:
        del default[name]
    kept = [hook for hook in custom if type_name(hook) not in HOOKS]
    if kept:
        compact['custom_hooks'] = kept


def _drop_constructor(optim_wrapper: dict) -> None:
    if type_name(dict(type=optim_wrapper.get('constructor'))) != CONSTRUCTOR:
        return
    options = optim_wrapper.pop('paramwise_cfg', None) or {}
    base = options.pop('base_constructor', None)
    del optim_wrapper['constructor']
    if base is not None:
        optim_wrapper['constructor'] = base
    options = {key: value for key, value in options.items() if key not in OPTIONS}
    if options:
        optim_wrapper['paramwise_cfg'] = options


class _NotFinite(float):
    """An infinite or NaN float whose repr is valid in a config file."""

    def __repr__(self) -> str:
        return f"float('{float(self)}')"


def plain(node: Any, key: str) -> Any:
    """Return a config node in values that a config file can hold."""
    if isinstance(node, Mapping):
        return {name: plain(value, f'{key}.{name}') for name, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(plain(value, f'{key}.{i}') for i, value in enumerate(node))
    if isinstance(node, (np.ndarray, np.generic, torch.Tensor)):
        return node.tolist()
    if isinstance(node, Path):
        return str(node)
    if isinstance(node, float) and not math.isfinite(node):
        return _NotFinite(node)
    if node is None or isinstance(node, (bool, int, float, complex, str, bytes, range, set)):
        return node
    name = getattr(node, '__qualname__', '<')
    if '<' in name:
        raise UserTypeError(
            f'the config cannot be written: {key.lstrip(".")} is {node!r}, which a config file '
            'cannot hold; register it and name it by a string'
        )
    return f'{node.__module__}.{name}'


def _unwrap(node: Any) -> Any:
    if isinstance(node, Mapping):
        inner = WRAPPERS.get(type_name(node))
        if inner:
            unwrapped = _unwrap(node[inner])
            preprocessor = node.get('data_preprocessor')
            if preprocessor is not None:
                unwrapped.setdefault('data_preprocessor', preprocessor)
            return unwrapped
        return ConfigDict({key: _unwrap(value) for key, value in node.items()})
    if isinstance(node, (list, tuple)):
        return type(node)(_unwrap(value) for value in node)
    return node


def dicts(node: Any) -> Iterator[Mapping]:
    """Yield all dicts in a config node, the node included."""
    if isinstance(node, Mapping):
        yield node
        node = node.values()
    elif not isinstance(node, (list, tuple)):
        return
    for value in node:
        yield from dicts(value)


def _drop_import(compact: ConfigDict) -> None:
    custom_imports = compact.get('custom_imports')
    if not custom_imports:
        return
    names = custom_imports['imports']
    names = [names] if isinstance(names, str) else names
    names = [name for name in names if name.split('.')[0] != 'mmexpand']
    if names:
        custom_imports['imports'] = names
    else:
        del compact['custom_imports']
