"""Where to resume: at the latest checkpoint that is whole, whatever a kill left behind."""

import logging
import re
import zipfile
from pathlib import Path

from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ..surgery.checkpoint import CheckpointError
from .compat import load_path, resumes, set_load_path
from .logs import log
from .ranks import on_main


def resume_from_whole(runner: Runner) -> None:
    """Let a Runner that resumes by itself pass over a checkpoint that was being written.

    mmengine writes checkpoints, and the ``last_checkpoint`` that names one, in place: a kill or a
    full disk leaves half of one. To be called on all ranks, before the Runner loads.

    Args:
        runner: left as it is unless it resumes the latest checkpoint and that is not whole.

    Raises:
        CheckpointError: if there is no whole checkpoint to resume.
    """
    if not resumes(runner) or load_path(runner) is not None:
        return
    path = on_main(lambda: _latest_whole(runner))
    if path is not None:
        set_load_path(runner, path)


def will_resume(runner: Runner) -> bool:
    """Whether a Runner that is to resume finds something to resume: else it starts anew."""
    if not resumes(runner):
        return False
    return load_path(runner) is not None or _pointer(runner).is_file()


def _pointer(runner: Runner) -> Path:
    """The file in which mmengine writes the latest checkpoint's path."""
    return Path(runner.work_dir, 'last_checkpoint')


def _latest_whole(runner: Runner) -> str | None:
    """The path to resume from; None where mmengine's own choice is right."""
    pointer = _pointer(runner)
    if not pointer.is_file():
        return None
    named = pointer.read_text().strip()
    if '://' in named or is_whole(named):
        return None
    for path in _checkpoints(runner, Path(named).parent):
        if is_whole(path):
            log(
                f'The latest checkpoint {named or "(none named)"} is missing or was cut short '
                f'while it was written: resuming from {path}',
                logging.WARNING,
            )
            return str(path)
    raise CheckpointError(
        f'{pointer} names {named or "nothing"}, which is missing or truncated, and there is no '
        f'whole checkpoint beside it to resume from; remove {pointer} to start anew'
    )


def _checkpoints(runner: Runner, directory: Path) -> list[Path]:
    """What CheckpointHook has written to resume from, the latest in front."""
    found: dict[Path, int] = {}
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            name = re.escape(hook.filename_tmpl).replace(re.escape('{}'), r'(\d+)')
            for path in [*Path(runner.work_dir).glob('*'), *directory.glob('*')]:
                match = re.fullmatch(name, path.name)
                if match:
                    found[path] = int(match[1])
    return sorted(found, key=found.get, reverse=True)


def is_whole(path: str | Path) -> bool:
    """Whether a checkpoint file is there to its end, every part with the checksum it says."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
