"""Reading configs from files and packages, overriding options, and checking for missing keys."""

import os

from mmengine.config import Config
from mmengine.hub import get_config

from ..errors import UserError
from .compact_config import dicts
from .compat import raw
from .error_report import with_type


class ConfigError(UserError, ValueError):
    """A config that cannot be used; the message names the file and the problem."""


def open_config(
    config: str | os.PathLike, cfg_options: dict | None = None, option: str = 'cfg_options'
) -> Config:
    """Read a config and override some of its values.

    Args:
        config: a path, or a name like ``mmdet::yolox/yolox_tiny_8xb8-300e_coco.py``.
        cfg_options: new values by dotted key.
        option: the user's name of ``cfg_options``, for messages.

    Raises:
        ConfigError: if the file is missing or cannot be read, or an override does not fit.
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
    hooks = (cfg_options or {}).get('custom_hooks') or ()
    if any(isinstance(hook, str) for hook in hooks):
        raise ConfigError(
            f'{option} cannot set custom_hooks, which is a list of dicts, got a list of text; set '
            'keys of default_hooks instead: default_hooks.expand.type=ExpandHook '
            'default_hooks.expand.include=backbone default_hooks.contract.type=ContractHook'
        )
    return cfg


def is_packaged(config: str) -> bool:
    """Return whether a config is named as part of a package: ``mmdet::...``."""
    return '::' in config


def _drop_scope(cfg: Config) -> None:
    # mmengine gives types from a `mmexpand::...` _base_ the scope mmexpand, but they belong to the
    # default scope.
    for node in dicts(raw(cfg)):
        if node.get('_scope_') == 'mmexpand':
            del node['_scope_']


def check_keys(cfg: Config, *needed: str) -> None:
    """Raise ConfigError, naming the missing keys, if a config lacks required keys."""
    missing = [key for key in needed if cfg.get(key) is None]
    if missing:
        raise ConfigError(
            f'{cfg.filename or "the config"} lacks {", ".join(missing)}; use a complete config, '
            'not one that is only a _base_ of others'
        )
