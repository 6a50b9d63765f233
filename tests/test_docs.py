"""The documentation builds without a warning, and every code block of it runs."""

import functools
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, DefaultScope
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from torch import nn

from mmexpand.__main__ import TOOLS
from mmexpand.mm.compact_config import HOOKS as OURS
from mmexpand.mm.compact_config import hook_configs, type_name
from mmexpand.mm.optim import by_layer
from mmexpand.study import load_study
from tests.tools_in_process import run_apart

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / 'docs').glob('*.md')), ROOT / 'README.md']
BLOCK = re.compile(r'^```(\w+)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
FILE = re.compile(r'# (\w+\.py)\n')
LINK = re.compile(r'\]\((?!https?:)([^)#\s]+)|(?:src|srcset)="([^"]+)"')
SMALLER = """_base_ = {base!r}
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(loader, batch_size=2)
val_dataloader = test_dataloader = loader
del loader
"""
CONFIG = re.compile(r'^(_base_|(custom|default)_hooks|optim_wrapper|model = dict)', re.MULTILINE)


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like a checkout, and can be written to; with a video.

    The demo's trainings have small batches there, which no worker loads.
    """
    (tmp_path / 'tools').symlink_to(ROOT / 'tools')
    for folder in (ROOT / 'configs').iterdir():
        (tmp_path / 'configs').mkdir(exist_ok=True)
        if folder.name != 'demo':
            (tmp_path / 'configs' / folder.name).symlink_to(folder)
    (tmp_path / 'configs/demo').mkdir()
    for config in (ROOT / 'configs/demo').glob('*.py'):
        (tmp_path / 'configs/demo' / config.name).write_text(SMALLER.format(base=str(config)))
    codec = cv2.VideoWriter.fourcc(*'mp4v')
    video = cv2.VideoWriter(str(tmp_path / 'clip.mp4'), codec, 5, (64, 48))
    for level in (0, 128):
        video.write(np.full((48, 64, 3), level, np.uint8))
    video.release()
    return tmp_path


def blocks(page, *languages):
    """The code of a page, with its language."""
    return [block for block in BLOCK.findall(page.read_text()) if block[0] in languages]


def pages(*languages):
    return pytest.mark.parametrize(
        'page', [page for page in PAGES if blocks(page, *languages)], ids=lambda page: page.stem
    )


@pages('python', 'bash')
def test_code_runs(page, checkout):
    """Blocks that begin with a file's name are that file; all others run, in their order.

    Configs are read, and what they name is built.
    """
    for language, code in blocks(page, 'python', 'bash'):
        named = FILE.match(code)
        path = checkout / (named[1] if named else 'block.py')
        path.write_text(code)
        if language == 'bash':
            run(checkout, *code.replace('\\\n', ' ').splitlines())
        elif 'arms = ' in code:
            load_study(path)
        elif not named and CONFIG.search(code):
            build(Config.fromfile(path))
        elif not named:
            run(checkout, 'python block.py')


def run(cwd, *commands):
    for command in commands:
        python, *arguments = shlex.split(command)
        assert python == 'python'
        done = run_apart(*arguments, cwd=cwd)
        assert done.returncode == 0, f'{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}'


def build(cfg):
    register_all_modules(init_default_scope=False)
    for hook in hook_configs(cfg):
        if type_name(hook) in OURS:
            HOOKS.build(hook)
    if 'optim_wrapper' in cfg and 'model' not in cfg:
        build_optim_wrapper(nn.Conv2d(3, 4, 3), by_layer(cfg.optim_wrapper))
    if 'model' in cfg and 'data_preprocessor' not in cfg.model:
        with DefaultScope.overwrite_default_scope('mmseg'):
            MODELS.build(cfg.model.backbone)


@pages('shell', 'console')
def test_commands_that_take_long_have_the_options_that_they_name(page):
    """They are not run: their tools are asked for help."""
    for _, code in blocks(page, 'shell', 'console'):
        for line in code.replace('\\\n', ' ').splitlines():
            words = shlex.split(line.removeprefix('$ '), comments=True)
            scripts = [word for word in words if word.startswith('tools/')]
            if words[:3] == ['python', '-m', 'mmexpand']:
                scripts = [f'tools/{TOOLS[words[3]]}']
            assert all((ROOT / script).exists() for script in scripts), line
            options = {word.partition('=')[0] for word in words if word.startswith('--')}
            if scripts and scripts[0].endswith('.py') and options:
                assert not {o for o in options if o not in help_of(scripts[0])}, line


@functools.cache
def help_of(script):
    return run_apart(script, '--help', cwd=ROOT).stdout


def test_links_to_files_hold():
    """Pages that Sphinx does not read are included."""
    outside = [*ROOT.glob('*.md'), *(ROOT / 'configs').glob('*/README.md')]
    for page in {*PAGES, *outside}:
        targets = [first or second for first, second in LINK.findall(page.read_text())]
        missing = [t for t in targets if not exists(page, t)]
        assert not missing, f'{page}: {missing}'


def exists(page, target):
    return (page.parent / target).exists()


def test_the_diagram_is_what_its_script_draws():
    script = runpy.run_path(str(ROOT / 'docs/draw_diagram.py'))
    for theme in script['THEMES']:
        kept = (script['FOLDER'] / f'diagram_{theme}.svg').read_text()
        assert kept == script['draw'](theme)


def test_it_builds_without_a_warning(tmp_path):
    command = [sys.executable, '-m', 'sphinx', '-W', '-q', '-E', '-b', 'html']
    done = subprocess.run(
        [*command, str(ROOT / 'docs'), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / 'getting_started.html').exists()
