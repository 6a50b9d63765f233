"""The drawings of blocks: committed files, boxes of all factors, blocks of a user's own module."""

import re
from pathlib import Path

import pytest

from mmexpand.analysis.drawing import draw_block, drawings
from mmexpand.core.blocks import build_expression
from mmexpand.core.expression import Norm, factors_of
from mmexpand.core.layer_spec import LayerSpec
from tests.tools_in_process import run_apart

ROOT = Path(__file__).parents[2]
KEPT = ROOT / 'docs/blocks'
DRAW = ROOT / 'tools/analysis_tools/draw_blocks.py'
OWN = """
from mmexpand.core.blocks import register_block
from mmexpand.core.expression import Sum

register_block('twins', lambda spec: Sum([spec.conv(), spec.conv()], spec.padding, spec.dilation))
"""


def boxes(drawing, kind):
    return drawing.count(f'class="{kind}" width')


def test_the_committed_drawings_are_those_of_the_blocks():
    assert {path.stem for path in KEPT.glob('*')} == set(drawings())
    stale = [name for name in drawings() if (KEPT / f'{name}.svg').read_text() != draw_block(name)]
    assert not stale, 'run: python -m mmexpand draw --out-dir docs/blocks'


@pytest.mark.parametrize('name', drawings())
def test_every_factor_and_norm_has_a_box(name):
    block, options = drawings()[name]
    linear = block == 'fc'
    size = (1, 1) if linear else (5, 5)
    spec = LayerSpec(8, 8, size, 4, padding=(2, 2), linear=linear, options=options)
    expression = build_expression(block, spec)
    drawing = draw_block(name, 5)
    norms = sum(isinstance(module, Norm) for module in expression.modules())
    assert boxes(drawing, 'factor') == len(factors_of(expression))
    assert boxes(drawing, 'norm') == norms
    assert drawing.count('>ReLU<') == (len(factors_of(expression)) - 1) * bool(options.nonlinear)


def test_every_branch_joins_the_sum():
    """Three arrows from the input, three that end at the circle."""
    drawing = draw_block('repvgg')
    circle = re.search(r'<circle class="other" cx="(\d+)" cy="(\d+)" r="(\d+)"', drawing)
    x, y, radius = map(int, circle.groups())
    ends = [rf'H{x - radius}"', rf'H{x}V{y - radius}"', rf'H{x}V{y + radius}"']
    assert all(len(re.findall(end, drawing)) == 1 for end in ends)
    assert len(re.findall(r'd="M4 \d+H20" marker-end', drawing)) == 3


def test_a_registered_block_is_drawn(tmp_path):
    (tmp_path / 'own.py').write_text(OWN)
    done = run_apart(DRAW, 'twins', '--imports', 'own', '--out-dir', 'drawn', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert boxes((tmp_path / 'drawn/twins.svg').read_text(), 'factor') == 2


def test_bad_input_is_refused(tmp_path):
    for arguments, words in (
        (['bn', '--imports', 'nowhere'], "No module named 'nowhere'; set PYTHONPATH"),
        (['repvg'], "block 'repvg' is not registered"),
        (['ck', '--kernel-size', '3'], 'choose another --kernel-size'),
    ):
        done = run_apart(DRAW, *arguments, cwd=tmp_path)
        assert done.returncode != 0
        assert words in done.stderr
        assert 'Traceback' not in done.stderr
