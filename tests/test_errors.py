"""Deliberate errors are UserErrors: tools print any other error with its traceback."""

import ast
import pickle
from pathlib import Path

import pytest

from mmexpand import errors

PACKAGE = Path(errors.__file__).parent
BUILT_IN = {name.removeprefix('User') for name in vars(errors) if name.startswith('User')}
LAYERS = ('surgery', 'analysis', 'models', 'report', 'mm', 'study', 'deploy')


def raised(path: Path) -> set[str]:
    """The names of the exceptions that a file makes and raises, and does not catch there."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    tried = [part for node in nodes if isinstance(node, ast.Try) for part in node.body]
    caught = {node for part in tried for node in ast.walk(part)}
    return {
        node.exc.func.id
        for node in nodes
        if isinstance(node, ast.Raise)
        and node not in caught
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
    }


@pytest.mark.parametrize('layer', LAYERS)
def test_errors_that_are_raised_on_purpose_are_user_errors(layer):
    found = {
        path.relative_to(PACKAGE).as_posix(): raised(path)
        for path in (PACKAGE / layer).rglob('*.py')
    }
    assert any(found.values())
    wrong = {name: kinds & BUILT_IN for name, kinds in found.items() if kinds & BUILT_IN}
    assert not wrong, wrong


def test_user_errors_are_the_built_in_ones_too():
    assert {'ValueError', 'TypeError', 'RuntimeError', 'FileNotFoundError'} <= BUILT_IN
    for name in BUILT_IN - {'Error'}:
        kind = getattr(errors, f'User{name}')
        assert issubclass(kind, errors.UserError)
        assert issubclass(kind, getattr(__import__('builtins'), name))
        # As between the processes of a data loader, or of a study.
        assert str(pickle.loads(pickle.dumps(kind('problem, value, fix')))) == 'problem, value, fix'
