"""The documentation builds without a warning, and every code block of it runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools_in_process import run_apart

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / 'docs').glob('*.md'))
BLOCK = re.compile(r'^```(python|bash)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
FILE = re.compile(r'# (\w+\.py)\n')


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like a checkout, and can be written to."""
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize(
    'page', [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.stem
)
def test_code_runs(page, checkout):
    """Blocks that begin with a file's name are that file; all others run, in their order."""
    for language, code in BLOCK.findall(page.read_text()):
        named = FILE.match(code)
        (checkout / (named[1] if named else 'block.py')).write_text(code)
        if named:
            continue
        commands = ['python block.py']
        if language == 'bash':
            commands = code.replace('\\\n', ' ').splitlines()
        for command in commands:
            python, *arguments = shlex.split(command)
            assert python == 'python'
            done = run_apart(*arguments, cwd=checkout)
            assert done.returncode == 0, f'{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}'


def test_it_builds_without_a_warning(tmp_path):
    command = [sys.executable, '-m', 'sphinx', '-W', '-q', '-E', '-b', 'html']
    done = subprocess.run(
        [*command, str(ROOT / 'docs'), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / 'getting_started.html').exists()
