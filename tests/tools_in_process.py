"""The tools, in this process or one of their own, without importing the stack again."""

import contextlib
import importlib.util
import multiprocessing
import os
import runpy
import sys
import tempfile
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

TOOLS = Path(__file__).parents[1] / 'tools'


@cache
def load(tool: str):
    """The module of a tool, such as 'train.py'."""
    path = TOOLS / tool
    sys.path.insert(0, str(path.parent))  # as for a script: modules beside it
    try:
        spec = importlib.util.spec_from_file_location(f'tool_{path.stem}', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def run(tool: str, *arguments) -> tuple[int, str]:
    """A tool's ``main()`` in this process: exit status, and what the exit says on stderr.

    An exception goes through: that is the traceback a user would see.
    """
    argv = [tool, *map(str, arguments)]
    with mock.patch.object(sys, 'argv', argv):
        try:
            load(tool).main()
        except SystemExit as exit_:
            if isinstance(exit_.code, str):
                return 1, exit_.code
            return exit_.code or 0, ''
    return 0, ''


TIMEOUT = 900
"""Seconds after which a process is taken to hang."""
_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['mmexpand', 'mmdet.apis', 'mmseg.apis', 'tests.quick_runs'])


def run_apart(path: str | Path, *arguments: object, cwd: Path | None = None) -> CompletedProcess:
    """A script in a process of its own, which another one that has imported the stack becomes.

    Nothing is imported again, and ``quick_runs`` is on; all else is as in a user's shell.
    """
    command = [str(part) for part in (path, *arguments)]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, 'stdout'), Path(folder, 'stderr')
        process = become(command, files, cwd)
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
        return CompletedProcess(command, process.exitcode, *(file.read_text() for file in files))


def become(
    command: list[str], files: tuple[Path, Path], cwd: Path | None = None, env: dict | None = None
) -> BaseProcess:
    """Start a script in a process that has imported the stack; it writes to stdout and stderr."""
    for file in files:
        file.touch()
    given = command, files, cwd or Path.cwd(), env or dict(os.environ)
    process = _context.Process(target=_become, args=given)
    with contextlib.chdir(TOOLS.parent):  # Elsewhere `tests` is mmsegmentation's package.
        forkserver.ensure_running()
    process.start()
    return process


def _become(command: list[str], files: tuple[Path, Path], cwd: Path, environment: dict) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for file, stream in zip(files, (sys.stdout, sys.stderr), strict=True):
        descriptor = os.open(file, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name='__main__')
