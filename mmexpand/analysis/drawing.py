"""Drawings of blocks as SVG, laid out from the expressions that the blocks build."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..core.blocks import BLOCKS, build_expression, choose_block
from ..core.blocks.nonlinear import NonlinearChain
from ..core.expression import (
    Chain,
    Deviation,
    Filter,
    Identity,
    Norm,
    Scale,
    Separable,
    Sum,
)
from ..core.layer_spec import LayerSpec
from ..core.names import near_matches
from ..core.options import BlockOptions
from ..errors import UserValueError

CHANNELS, RATE = 8, 4
"""Inputs and outputs of the drawn layer, and the expansion rate."""

BOX, GAP, ARROW, LETTER = 22, 6, 16, 6.1
"""Pixels: a box's height, the gap between branches, an arrow, a letter."""

RADIUS = 8
"""Radius of the circle of a sum."""

# The lines are grey and the boxes have fills of their own: both show on white and on black pages.
STYLE = (
    'path{stroke:#7d8590;stroke-width:1.3;fill:none}'
    '.head{fill:#7d8590;stroke:none}'
    'rect,circle{stroke:#57606a}'
    'text{font:11px sans-serif;text-anchor:middle;fill:#1f2328}'
    '.factor{fill:#9ecae1}.fixed{fill:#d9d9d9}.scale{fill:#fdd0a2}.norm{fill:#a1d99b}'
    '.other{fill:#ffffff}'
)


VARIANTS = {
    'cl_norm': ('cl', BlockOptions(norm=True)),
    **{f'{chain}_shortcut': (chain, BlockOptions(shortcut=True)) for chain in ('cl', 'ck')},
    **{f'{chain}_relu': (chain, BlockOptions(nonlinear='relu')) for chain in ('cl', 'ck', 'fc')},
    **{f'repvgg_{main}': ('repvgg', BlockOptions(main=main)) for main in ('cl', 'ck')},
}
"""Drawings of blocks with options: the block and its options by the drawing's name."""


@dataclass(frozen=True)
class _Part:
    """A laid out part; its line enters on the left and leaves on the right, at half height."""

    width: int
    height: int
    marks: str

    @property
    def middle(self) -> int:
        return self.height // 2

    def at(self, x: int, y: int) -> str:
        return f'<g transform="translate({x} {y})">{self.marks}</g>'


def draw_block(name: str, kernel_size: int | None = None) -> str:
    """Return the drawing of a block in the place of a layer with 8 inputs and outputs, at rate 4.

    Args:
        name: a block of the library, one given to ``register_block``, or one of ``VARIANTS``.
        kernel_size: kernel size of the layer; None: the first of 3, 5 and 1 that the block fits.

    Raises:
        ValueError: if the block is unknown or does not fit the kernel.
    """
    if name not in drawings():
        raise UserValueError(f'block {name!r} is not registered; {near_matches(name, drawings())}')
    sizes = (3, 5, 1) if kernel_size is None else (kernel_size,)
    return _document(name, _layout(_expression(*drawings()[name], sizes)))


def drawings() -> dict[str, tuple[str, BlockOptions]]:
    """Return the names of drawings, each with its block and options."""
    return {**{name: (name, BlockOptions()) for name in BLOCKS}, **VARIANTS}


def _expression(block: str, options: BlockOptions, sizes: Sequence[int]) -> nn.Module:
    for size in sizes:
        try:
            return build_expression(*choose_block(block, _site(size, options, block == 'fc')))
        except UserValueError as error:
            reason = error
    raise UserValueError(f'{reason}; choose another --kernel-size')


def _site(size: int, options: BlockOptions, linear: bool) -> LayerSpec:
    if linear:
        return LayerSpec(CHANNELS, CHANNELS, (1, 1), RATE, linear=True, options=options)
    padding = size // 2, size // 2
    return LayerSpec(CHANNELS, CHANNELS, (size, size), RATE, padding=padding, options=options)


def _layout(node: nn.Module) -> _Part:
    """Return the picture of a node, with everything inside."""
    if isinstance(node, Sum):
        return _parallel([_layout(branch) for branch in node])
    return _row(_steps(node))


def _steps(node: nn.Module) -> list[_Part]:
    """Return what a node applies, one after another."""
    if isinstance(node, NonlinearChain):
        relu = _box('ReLU', 'other')
        return [step for i, part in enumerate(node) for step in [relu][:i] + _steps(part)]
    if isinstance(node, Chain):
        return [step for part in node for step in _steps(part)]
    if isinstance(node, Separable):
        return [*_steps(node.depthwise), *_steps(node.pointwise)]
    if isinstance(node, Norm):
        return [*_steps(node.node), _box('BN', 'norm')]
    if isinstance(node, Scale):
        return [*_steps(node.node), _box('scale', 'scale')]
    if isinstance(node, Filter):
        height, width = node.taps.shape[2:]
        return [*_steps(node.node), _box(f'fixed {height}x{width}', 'fixed')]
    if isinstance(node, Sum):
        return [_layout(node)]
    if isinstance(node, Identity):
        return [_box('identity', 'fixed')]
    return [_box(_factor_text(node), 'factor')]


def _factor_text(node: nn.Module) -> str:
    if isinstance(node, nn.Linear):
        return f'linear {node.in_features}→{node.out_features}'
    if not isinstance(node, (nn.Conv2d, Deviation)):  # A node of a user's own class.
        out, _, height, width = node.shape
        return f'{type(node).__name__} {height}x{width} →{out}'
    out, inside, height, width = node.shape
    depthwise = inside == 1
    text = f'{height}x{width} {CHANNELS if depthwise else inside}→{out}'
    text += ' depthwise' if depthwise else ''
    return f'I + D: {text}' if isinstance(node, Deviation) else text


def _box(text: str, kind: str) -> _Part:
    width = round(len(text) * LETTER) + 12
    rect = f'<rect class="{kind}" width="{width}" height="{BOX}" rx="3"/>'
    return _Part(width, BOX, f'{rect}<text x="{width / 2:g}" y="15">{text}</text>')


def _row(parts: Sequence[_Part]) -> _Part:
    """Return parts from left to right, joined by arrows."""
    height = max(part.height for part in parts)
    marks, x = [], 0
    for part in parts:
        if x:
            marks.append(_arrow(f'M{x} {height // 2}h{ARROW}'))
            x += ARROW
        marks.append(part.at(x, height // 2 - part.middle))
        x += part.width
    return _Part(x, height, ''.join(marks))


def _parallel(branches: Sequence[_Part]) -> _Part:
    """Return branches from top to bottom, from one input on the left to a sum on the right."""
    if len(branches) == 1:
        return branches[0]
    height = sum(branch.height for branch in branches) + GAP * (len(branches) - 1)
    middle, fork, left = height // 2, 4, 4 + ARROW
    centre = left + max(branch.width for branch in branches) + 12 + RADIUS
    marks, y, rows = [], 0, []
    for branch in branches:
        row = y + branch.middle
        rows.append(row)
        marks.append(_arrow(f'M{fork} {row}H{left}'))
        marks.append(branch.at(left, y))
        marks.append(_join(left + branch.width, row, centre, middle))
        y += branch.height + GAP
    marks.append(f'<path d="M0 {middle}H{fork}M{fork} {rows[0]}V{rows[-1]}"/>')
    marks.append(f'<circle class="other" cx="{centre}" cy="{middle}" r="{RADIUS}"/>')
    marks.append(f'<text x="{centre}" y="{middle + 4}">+</text>')
    return _Part(centre + RADIUS, height, ''.join(marks))


def _join(x: int, row: int, centre: int, middle: int) -> str:
    """Return the line from a branch to the circle: from the left, from above or from below."""
    if abs(row - middle) < RADIUS:
        return _arrow(f'M{x} {row}H{centre - RADIUS}')
    end = middle - RADIUS if row < middle else middle + RADIUS
    return _arrow(f'M{x} {row}H{centre}V{end}')


def _arrow(path: str) -> str:
    return f'<path d="{path}" marker-end="url(#a)"/>'


def _document(name: str, part: _Part) -> str:
    margin, ends = 2, 22
    width, height = part.width + 2 * ends, part.height + 2 * margin
    middle = margin + part.middle
    return '\n'.join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" aria-label="block {name}">',
            f'<style>{STYLE}</style>',
            '<defs><marker id="a" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="6" '
            'markerHeight="6" orient="auto"><path class="head" d="M0 0L6 3L0 6Z"/></marker></defs>',
            _arrow(f'M2 {middle}H{ends}'),
            part.at(ends, margin).replace('><', '>\n<'),
            _arrow(f'M{ends + part.width} {middle}H{width - 2}'),
            '</svg>\n',
        ]
    )
