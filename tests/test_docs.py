"""The documentation builds without a warning, and every code block of it runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    env['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{env["PATH"]}'
    for language, code in BLOCK.findall(page.read_text()):
        named = FILE.match(code)
        if named:
            (checkout / named[1]).write_text(code)
            continue
        command = ['bash', '-e'] if language == 'bash' else [sys.executable]
        done = subprocess.run(
            command, input=code, cwd=checkout, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f'{code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}'


def test_it_builds_without_a_warning(tmp_path):
    command = [sys.executable, '-m', 'sphinx', '-W', '-q', '-E', '-b', 'html']
    done = subprocess.run(
        [*command, str(ROOT / 'docs'), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / 'getting_started.html').exists()
