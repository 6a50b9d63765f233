"""The layers of the package, and what each may import."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'mmexpand'
DOCS = PACKAGE.parent / 'docs'
FRAMEWORKS = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'}
ALLOWED = {
    'core': set(),
    'surgery': {'core'},
    'analysis': {'core', 'surgery'},
    'report': set(),
    'models': set(),
    'mm': {'core', 'surgery', 'analysis', 'models', 'report'},
    'deploy': {'core', 'surgery', 'mm'},
    'study': {'core', 'report', 'mm'},
}
"""The layers that each layer imports, as docs/layers.svg shows them."""

EDGE = re.compile(r'data-edge="(\w+) (\w+)"')


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
    """Every allowed import is in use: the table and the picture show what is there."""
    used = set()
    for path in (PACKAGE / layer).rglob('*.py'):
        found = imports(path) & set(ALLOWED) - {layer}
        assert found <= ALLOWED[layer], path
        used |= found
        if layer in ('core', 'surgery', 'analysis', 'report'):
            assert not imports(path) & FRAMEWORKS, path
    assert used == ALLOWED[layer]


def test_the_picture_shows_the_layers_and_their_imports():
    script = runpy.run_path(str(DOCS / 'draw_layers.py'))
    kept = (DOCS / 'layers.svg').read_text()
    edges = {(importer, layer) for importer, layers in ALLOWED.items() for layer in layers}
    assert set(EDGE.findall(kept)) == edges
    assert kept == script['draw'](ALLOWED), 'run: python docs/draw_layers.py'


def test_the_page_names_files_that_exist():
    named = set(re.findall(r'`([\w/]+/(?:[\w]+\.py)?)`', (DOCS / 'architecture.md').read_text()))
    assert len(named) > 10
    missing = [n for n in named if not any((r / n).exists() for r in (PACKAGE, PACKAGE.parent))]
    assert not missing


def test_the_picture_refuses_imports_that_point_up():
    script = runpy.run_path(str(DOCS / 'draw_layers.py'))
    with pytest.raises(ValueError, match='imports point up'):
        script['draw'](ALLOWED | {'core': {'mm'}})


def test_every_layer_is_listed():
    layers = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name[0] not in '._'}
    assert layers <= set(ALLOWED)


NOT_ON_WINDOWS = {'fcntl', 'grp', 'posix', 'pty', 'pwd', 'resource', 'syslog', 'termios', 'tty'}


def test_no_module_imports_what_windows_lacks():
    """At the top of a file; a function may, for a feature that only Linux has."""
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
mmexpand.expand_(model, method='cl')
mmexpand.contract_(model)
assert type(model[0]) is torch.nn.Conv2d
assert not FRAMEWORKS & set(sys.modules)
"""
    script = f'import importlib.util\nFRAMEWORKS = {FRAMEWORKS!r}\n{script}'
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('layer', ['core', 'surgery'])
def test_private_parts_of_others_are_in_compat_alone(layer):
    """Names with an underscore are ours, or override a method by a ``def``."""
    trees = {path: ast.parse(path.read_text()) for path in (PACKAGE / layer).rglob('*.py')}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    functions = (ast.FunctionDef, ast.ClassDef)
    ours = {node.name for _, node in nodes if isinstance(node, functions)}
    ours |= {a.attr for _, a in nodes if isinstance(a, ast.Attribute) and is_set_on_self(a)}
    used = {
        (path.name, node.attr)
        for path, node in nodes
        if isinstance(node, ast.Attribute) and node.attr[0] == '_' and node.attr[:2] != '__'
    }
    private = {(file, name) for file, name in used if name not in ours}
    assert private, 'the search finds nothing'
    assert {file for file, _ in private} == {'compat.py'}, private


def is_set_on_self(node: ast.Attribute) -> bool:
    stored = isinstance(node.ctx, ast.Store)
    return stored and isinstance(node.value, ast.Name) and node.value.id == 'self'
