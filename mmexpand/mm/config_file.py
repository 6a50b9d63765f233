"""Configs: read from a file or a package, changed as options say, and checked for missing keys."""

import os

from mmengine.config import Config
from mmengine.hub import get_config

from ..errors import UserError
from .compact_config import dicts
from .compat import raw
from .error_report import with_type


class ConfigError(UserError, ValueError):
    """A config that cannot be used; the message names it and what is wrong."""


def open_config(
    config: str | os.PathLike, cfg_options: dict | None = None, option: str = 'cfg_options'
) -> Config:
    """Read a config and override what is named.

    Args:
        config: a path, or a name like ``mmdet::yolox/yolox_tiny_8xb8-300e_coco.py``.
        cfg_options: what is overridden, by dotted key.
        option: what the user knows them as.

    Raises:
        ConfigError: if the file is missing or wrong, or the overrides do not fit it.
    """
    config = os.fspath(config)
    if not is_packaged(config) and not os.path.isfile(config):
        raise ConfigError(f'{config}: no such config file')
    try:
        cfg = get_config(config) if is_packaged(config) else Config.fromfile(config)
        _drop_scope(cfg)
    except Exception as error:  # A config is Python: it can raise anything.
        raise ConfigError(f'{config} cannot be read: {with_type(error)}') from error
    try:
        cfg.merge_from_dict(cfg_options or {})
    except Exception as error:  # mmengine asserts, and looks up keys and indexes.
        raise ConfigError(f'{option} does not fit {config}: {with_type(error)}') from error
    hooks = (cfg_options or {}).get('custom_hooks', ())
    if any(isinstance(hook, str) for hook in hooks):
        raise ConfigError(
            f'{option}: custom_hooks is a list of text, not of hooks, which cannot be written '
            'there; name the keys of one instead: default_hooks.expand.type=ExpandHook '
            'default_hooks.expand.include=backbone default_hooks.contract.type=ContractHook'
        )
    return cfg


def is_packaged(config: str) -> bool:
    """Whether a config is named as one that a package carries: ``mmdet::...``."""
    return '::' in config


def _drop_scope(cfg: Config) -> None:
    # Where `mmexpand::...` is a _base_, mmengine takes its types for mmexpand's; they are those of
    # the default scope.
    for node in dicts(raw(cfg)):
        if node.get('_scope_') == 'mmexpand':
            del node['_scope_']


def check_keys(cfg: Config, *needed: str) -> None:
    """Refuse a config that lacks something.

    Raises:
        ConfigError: naming what it lacks.
    """
    missing = [key for key in needed if cfg.get(key) is None]
    if missing:
        raise ConfigError(
            f'{cfg.filename or "the config"} lacks {", ".join(missing)}; is it a complete config, '
            'or one of those that others take as _base_?'
        )
