"""The layers of the package, and what each may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'mmexpand'
FRAMEWORKS = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'}
ALLOWED = {
    'core': {'core'},
    'surgery': {'core', 'surgery', 'files'},
    'analysis': {'core', 'surgery', 'analysis'},
    'report': {'files', 'report'},
    'mm': {'core', 'surgery', 'analysis', 'mm', 'models', 'files', 'report', 'version'},
    'models': {'models'},
    'deploy': {'core', 'surgery', 'mm', 'files', 'deploy'},
    'study': {'core', 'mm', 'files', 'report', 'study', 'version'},
}


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports; a package of ours by its layer."""
    found = set()
    layer = path.relative_to(PACKAGE).parts[0]
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name.split('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            parts = node.module.split('.')
            found.add(parts[1] if parts[0] == 'mmexpand' and len(parts) > 1 else parts[0])
        elif isinstance(node, ast.ImportFrom):
            outside = node.level == depth
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found.update(name.split('.')[0] if outside else layer for name in names)
    return found


@pytest.mark.parametrize(
    'layer', sorted(p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name in ALLOWED)
)
def test_layers_import_downwards_only(layer):
    files = list((PACKAGE / layer).rglob('*.py'))
    assert files
    for path in files:
        used = imports(path)
        assert used & set(ALLOWED) <= ALLOWED[layer], path
        if layer in ('core', 'surgery', 'analysis', 'report'):
            assert not used & FRAMEWORKS, path


def test_every_layer_is_listed():
    layers = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name[0] not in '._'}
    assert layers <= set(ALLOWED)


NOT_ON_WINDOWS = {'fcntl', 'grp', 'posix', 'pty', 'pwd', 'resource', 'syslog', 'termios', 'tty'}


def test_no_module_needs_what_windows_lacks():
    """Where it is imported at the top; in a function it may be, for what only Linux has."""
    paths = [*PACKAGE.rglob('*.py'), *(PACKAGE.parent / 'tools').rglob('*.py')]
    for path in paths:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ''] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split('.')[0] for name in names} & NOT_ON_WINDOWS, path


def test_torch_alone_is_enough():
    """In a process where nothing of OpenMMLab can be imported."""
    script = """
import importlib.machinery, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in FRAMEWORKS:
            raise ModuleNotFoundError(name)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in FRAMEWORKS else find_spec(name, *a)
sys.meta_path.insert(0, Block())
import torch, mmexpand
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
mmexpand.expand_(model)
mmexpand.contract_(model)
assert type(model[0]) is torch.nn.Conv2d
assert not FRAMEWORKS & set(sys.modules)
"""
    script = f'import importlib.util\nFRAMEWORKS = {FRAMEWORKS!r}\n{script}'
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
