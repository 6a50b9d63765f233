"""The wheel: what is in it, and that it leaves the packages it is installed beside alone."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mmexpand.__main__ import TOOLS

ROOT = Path(__file__).parents[1]


def run(*command, cwd):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key != 'PYTHONPATH'},
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return done.stdout


@pytest.fixture(scope='module')
def newcomer(tmp_path_factory):
    """An environment with this one's packages but mmexpand, which is installed as a wheel.

    Gives its Python, and the packages before and after.
    """
    folder = tmp_path_factory.mktemp('newcomer')
    run(sys.executable, '-m', 'pip', 'wheel', ROOT, '--no-deps', '--no-build-isolation', cwd=folder)
    (wheel,) = folder.glob('mmexpand-*.whl')
    stack = folder / 'stack'
    stack.mkdir()
    for path in Path(sysconfig.get_paths()['purelib']).iterdir():
        if 'mmexpand' not in path.name:
            (stack / path.name).symlink_to(path)
    run(sys.executable, '-m', 'venv', folder / 'venv', cwd=folder)
    python = folder / 'venv/bin/python'
    site = run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=folder)
    Path(site.strip(), 'stack.pth').write_text(f'{stack}\n')
    listed = [python, '-m', 'pip', 'list', '--format=freeze']
    before = run(*listed, cwd=folder)
    # With its dependencies: all that it asks for is there.
    run(python, '-m', 'pip', 'install', '--no-index', wheel, cwd=folder)
    return python, before.splitlines(), run(*listed, cwd=folder).splitlines()


def test_no_other_package_changes(newcomer):
    _, before, after = newcomer
    added = [line for line in after if line not in before]
    assert [line.partition('==')[0] for line in added] == ['mmexpand']
    assert [line for line in before if line not in after] == []
    assert any(line.startswith(('mmdet==', 'onedl-mmdetection==')) for line in before)


@pytest.mark.parametrize(
    ('base', 'words'),
    [
        ('unet/unet-s5-d16_expand-cl-r4_fcn_4xb4-160k_cityscapes-512x1024', 'backbone.encoder.0'),
        ('yolo_lite/yolo-lite_expand-cl-r4_1xb64-600k_voc0712-224x224', 'backbone.convs.0.conv'),
    ],
)
def test_configs_are_a_base_for_other_projects(newcomer, tmp_path, base, words):
    python, *_ = newcomer
    (tmp_path / 'own.py').write_text(f"_base_ = 'mmexpand::{base}.py'\n")
    command = ('-m', 'mmexpand', 'plan', 'own.py', '--shape', '64', '64')
    assert words in run(python, *command, cwd=tmp_path)


HELP = """
import contextlib, sys
from mmexpand.__main__ import TOOLS, main
for tool in TOOLS:
    sys.argv = ['mmexpand', tool, '--help']
    with contextlib.suppress(SystemExit):
        main()
"""


def test_tools_run_without_a_checkout(newcomer, tmp_path):
    python, *_ = newcomer
    said = run(python, '-c', HELP, cwd=tmp_path)
    names = [Path(script).name for script in TOOLS.values()]
    assert [said.count(f'usage: {name} [-h]') for name in names] == [1] * len(TOOLS)


def test_an_unknown_tool_is_named(newcomer, tmp_path):
    python, *_ = newcomer
    done = subprocess.run(
        [python, '-m', 'mmexpand', 'trian'], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "unknown tool 'trian'; usage: python -m mmexpand {train,test," in done.stderr


@pytest.mark.parametrize('version', [(3, 10), (3, 11), (3, 13), (3, 14)])
def test_setup_takes_pythons_that_the_pins_have_wheels_for(tmp_path, version):
    """Others are refused at once, by a message that names them; nothing is made."""
    python = tmp_path / 'python'
    pretend = f'import sys; sys.version_info = {(*version, 0)}; exec(sys.argv[1])'
    # Past the check of the version it is a Python without venv, so that nothing is built.
    python.write_text(
        f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\n'
        f'exec {sys.executable} -c "{pretend}" "$2"\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ['bash', ROOT / 'tools/setup_env.sh', tmp_path / 'venv'],
        env={**os.environ, 'PYTHON': str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    wrong = version in ((3, 10), (3, 14))
    assert ('name one of Python 3.11 to 3.13' in done.stderr) == wrong, done.stderr
    assert ('has no venv module' in done.stderr) == (not wrong), done.stderr
    assert not (tmp_path / 'venv').exists()
