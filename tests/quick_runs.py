"""Import this module to make short runs of mmengine take half the time.

mmengine formats a run's config ten times, reads the metafiles of all networks for each config of
mmdet or mmseg, and collects garbage among all that is imported for each data set. The forks'
mmengine finds the formatting function where it is used.
"""

import functools
import gc

from mmengine.config import config, utils
from yapf.yapflib import yapf_api

_format_code = yapf_api.FormatCode


@functools.lru_cache(maxsize=32)
def _format_once(text: str, style: tuple) -> tuple[str, bool]:
    return _format_code(text, style_config=dict(style))


def _format(text: str, style_config: dict, **_: object) -> tuple[str, bool]:
    return _format_once(text, tuple(style_config.items()))


def freeze_imports() -> None:
    """Keep the objects that exist now out of later garbage collections."""
    gc.collect()
    gc.freeze()


config.FormatCode = yapf_api.FormatCode = _format
utils.load = functools.cache(utils.load)  # Of metafiles, which are only read.
config.is_installed = functools.cache(config.is_installed)
freeze_imports()
