"""The config of the compact network: the user's, without anything of ours."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config, ConfigDict

from .runtime import CPU_WRAPPER

HOOKS = ('ExpandHook', 'ContractHook')
BUILDERS = {'ExpandBackbone': 'backbone', 'ExpandModel': 'model'}
NETWORKS = ('YOLOLite', 'YOLOV2Head', 'SmallNet')
"""What stock OpenMMLab lacks: a compact config that names one of these still imports mmexpand."""


def make_compact_config(cfg: Config) -> Config:
    """Strip a config of everything that expands or contracts.

    Hooks of ours go, builders give way to what they build, and ``custom_imports`` of mmexpand
    goes too unless the network itself is one of ours. It neither resumes nor loads weights.

    Args:
        cfg: the config that was trained; it is not changed.

    Returns:
        A config that stock mmdet or mmsegmentation builds the compact network from.
    """
    compact = _unwrap(copy.deepcopy(cfg._cfg_dict))
    hooks = [hook for hook in compact.get('custom_hooks') or () if type_name(hook) not in HOOKS]
    compact.pop('custom_hooks', None)
    if hooks:
        compact['custom_hooks'] = hooks
    if not any(type_name(node) in NETWORKS for node in _dicts(compact)):
        _drop_import(compact)
    if compact.get('model_wrapper_cfg') == CPU_WRAPPER:
        del compact['model_wrapper_cfg']
    compact.update(resume=False, load_from=None)
    if 'launcher' in compact:
        compact['launcher'] = 'none'
    return Config(compact)


def type_name(node: Any) -> str | None:
    """The ``type`` of a config node, without its scope; None where it has none."""
    kind = node.get('type') if isinstance(node, Mapping) else None
    if isinstance(kind, str):
        return kind.rpartition('.')[2]
    return getattr(kind, '__name__', None)


def _unwrap(node: Any) -> Any:
    if isinstance(node, Mapping):
        inner = BUILDERS.get(type_name(node))
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


def _dicts(node: Any) -> Iterator[Mapping]:
    if isinstance(node, Mapping):
        yield node
        node = node.values()
    elif not isinstance(node, (list, tuple)):
        return
    for value in node:
        yield from _dicts(value)


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
