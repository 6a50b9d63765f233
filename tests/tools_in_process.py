"""The tools' ``main()`` in this process: what a user sees of them, without starting Python anew."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
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
    """Exit status and what the exit says on stderr, beside what the tool prints itself.

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
