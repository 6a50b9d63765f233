"""The rules for English of CONTRIBUTING.md, as far as a search can check them."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ('analysis', 'core', 'deploy', 'mm', 'models', 'report', 'study', 'surgery')
CODE = [
    *(path for layer in LAYERS for path in (ROOT / 'mmexpand' / layer).rglob('*.py')),
    *(ROOT / 'mmexpand').glob('*.py'),
    *(ROOT / 'tools').rglob('*.py'),
    *(ROOT / 'examples').glob('*.py'),
    *(ROOT / 'docs').glob('*.py'),
]
PAGES = [
    *(ROOT / 'docs').glob('*.md'),
    ROOT / 'README.md',
    *(ROOT / 'configs').rglob('*.md'),
    *(ROOT / 'mmexpand' / 'report' / 'templates').glob('*.html'),
]
BANNED = re.compile(
    r'\b(mend(ed|s)?|anew|is said|are said|that one|what there is|those that|wants|wanted)\b', re.I
)
OPENINGS = re.compile(r'(What|Whether|Of)\b')
TITLES = re.compile(r'(#+ |.*<(h\d|p)\b[^>]*>)(What|Whether|Of)\b')
NO_VERB = re.compile(r'(What|Whether|Of|The|A|An|Why|How|Where|When|All|Each|Every|If|In|On)\b')
"""First words of a docstring that are no verb."""


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.AST, int, str]]:
    """Yield each documented node with the line and text of its docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield node, node.body[0].lineno, text


def opening_problems(source: str) -> list[str]:
    """Return the docstrings that open as the rules forbid."""
    found = []
    for node, line, text in docstrings(ast.parse(source)):
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if (NO_VERB if function else OPENINGS).match(text):
            found.append(f'line {line}: {text.splitlines()[0]}')
    return found


def word_problems(source: str) -> list[str]:
    """Return the comments and strings of a module that contain a banned word."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts = [(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT]
    texts += [
        (node.lineno, node.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return [f'line {line}: {found[0]}' for line, text in texts if (found := BANNED.search(text))]


def test_the_search_finds_what_the_rules_forbid():
    assert opening_problems('"""Of a thing."""\n')
    assert opening_problems('def f():\n    """The sum."""\n')
    assert not opening_problems('class A:\n    """The sum."""\n')
    assert word_problems('x = 1  # made anew\n')
    assert word_problems("raise ValueError(f'a number is wanted, got {x}')\n")
    assert not word_problems("x = f'an amendment: {wanted}'\n")
    assert TITLES.match('## Whether it helps') and TITLES.match(
        '  <h2 class="next">What it is</h2>'
    )
    assert not TITLES.match('## The units') and not TITLES.match('the rest <b>Of</b> it')


@pytest.mark.parametrize('path', CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code(path):
    source = path.read_text()
    assert not opening_problems(source) + word_problems(source)


@pytest.mark.parametrize('path', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages(path):
    lines = path.read_text().splitlines()
    assert not [line for line in lines if BANNED.search(line) or TITLES.match(line)]
