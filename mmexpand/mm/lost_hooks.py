"""A warning for hooks of a base config that are lost, since ``custom_hooks`` replaces a list."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping

from mmengine.config import Config

from .compact_config import HOOKS, hook_configs, type_name
from .compat import base_files, is_pure_python
from .logs import log


def warn_of_lost_hooks(cfg: Config) -> None:
    """Log a warning if a config with hooks of mmexpand has lost hooks of its base configs.

    Args:
        cfg: a config read from a file, with options merged into it.
    """
    for base, names in lost_hooks(cfg):
        inherited = 'custom_hooks' if is_pure_python(base) else '_base_.custom_hooks'
        log(
            f'custom_hooks replaces the list of {base}: {", ".join(names)} will not run. Write '
            f'custom_hooks=[*{inherited}, ...], or put the hooks of mmexpand into '
            "default_hooks, which are merged: default_hooks=dict(expand=dict(type='ExpandHook', "
            "...), contract=dict(type='ContractHook'))",
            logging.WARNING,
        )


def lost_hooks(cfg: Config) -> list[tuple[str, list[str]]]:
    """Return the base configs whose hooks are lost, each with the names of these hooks.

    A list without hooks of mmexpand is ignored: it may replace hooks on purpose.
    """
    present = _names(hook_configs(cfg))
    if cfg.filename is None or not present.keys() & set(HOOKS):
        return []
    try:
        # Include the file itself: options may have replaced its list.
        return list(_lost(present, str(cfg.filename)))
    except Exception:  # The file may be gone or changed, but only a warning depends on it.
        return []


def _lost(present: Counter, path: str) -> Iterator[tuple[str, list[str]]]:
    written = Config.fromfile(path, import_custom_modules=False)
    theirs = _names(written.get('custom_hooks') or ())
    missing = [name for name in theirs - present if name not in HOOKS]
    if missing:
        yield path, missing
    if not theirs.keys() & set(HOOKS):
        return
    present = _names(hook_configs(written))
    for base in base_files(path):
        yield from _lost(present, base)


def _names(hooks: Mapping | list) -> Counter:
    return Counter(name for hook in hooks if (name := type_name(hook)))
