"""Resuming from the latest complete checkpoint after a kill or a full disk."""

import logging
import re
import zipfile
from itertools import chain
from pathlib import Path

from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ..surgery.checkpoint import CheckpointError
from .compat import load_path, resumes, set_load_path
from .logs import log
from .ranks import on_main


def resume_from_whole(runner: Runner) -> None:
    """Make a Runner that resumes automatically skip a truncated checkpoint.

    mmengine writes checkpoints and ``last_checkpoint``, the file with the latest one's path, in
    place: a kill or a full disk truncates them. Call it on all ranks, before the Runner loads.

    Args:
        runner: changed only if it resumes the latest checkpoint and this checkpoint is not whole.

    Raises:
        CheckpointError: if no complete checkpoint exists.
    """
    if not resumes(runner) or load_path(runner) is not None:
        return
    path = on_main(lambda: _latest_whole(runner))
    if path is not None:
        set_load_path(runner, path)


def will_resume(runner: Runner) -> bool:
    """Return whether a Runner will resume; without a checkpoint it trains from the start."""
    if not resumes(runner):
        return False
    return load_path(runner) is not None or _pointer(runner).is_file()


def _pointer(runner: Runner) -> Path:
    """Return the file in which mmengine writes the latest checkpoint's path."""
    return Path(runner.work_dir, 'last_checkpoint')


def _latest_whole(runner: Runner) -> str | None:
    """Return the path to resume from, or None if mmengine's own choice is right."""
    pointer = _pointer(runner)
    if not pointer.is_file():
        return None
    named = pointer.read_text().strip()
    if '://' in named or is_whole(named):
        return None
    for path in _checkpoints(runner):
        if is_whole(path):
            log(
                f'The latest checkpoint {named or "(none named)"} is missing or truncated: '
                f'resuming from {path}',
                logging.WARNING,
            )
            return str(path)
    raise CheckpointError(
        f'cannot resume: {pointer} names {named or "nothing"}, which is missing or truncated, and '
        f'no complete checkpoint is left; remove {pointer} to train from the start'
    )


def _checkpoints(runner: Runner) -> list[Path]:
    """Return the checkpoints that CheckpointHooks have written, the latest first."""
    found: dict[Path, int] = {}
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            name = re.escape(hook.filename_tmpl).replace(re.escape('{}'), r'(\d+)')
            work_dir = Path(runner.work_dir)
            # mmengine's rule for `out_dir`.
            folders = [work_dir, *([Path(hook.out_dir, work_dir.name)] if hook.out_dir else [])]
            for path in chain.from_iterable(folder.glob('*') for folder in folders):
                match = re.fullmatch(name, path.name)
                if match:
                    found[path] = int(match[1])
    return sorted(found, key=found.get, reverse=True)


def is_whole(path: str | Path) -> bool:
    """Return whether a checkpoint file is complete, by the checksums of its parts.

    A folder, as DeepSpeed writes, is not checked.
    """
    if path and Path(path).is_dir():
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
