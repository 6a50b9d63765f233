"""Draw the README's diagram, for light and for dark pages: ``python docs/draw_diagram.py``."""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / 'resources'

THEMES = {
    'light': dict(
        text='#1f2328', line='#59636e', factor='#9ecae1', norm='#a1d99b', fixed='#d9d9d9'
    ),
    'dark': dict(text='#e6edf3', line='#9198a1', factor='#1f4b77', norm='#22572b', fixed='#3d444d'),
}
"""Colours by the theme of the page; the background is the page's."""

ROWS = (('3x3', 50), ('1x1', 94), ('identity', 138))
"""Branches of RepVGG's block, and the height at which each is drawn."""

MIDDLE = ROWS[1][1]


def draw(theme: str) -> str:
    """Return the diagram as an SVG document.

    Args:
        theme: a key of ``THEMES``.
    """
    colours = THEMES[theme]
    parts = [
        _title(60, 'your network'),
        _line(2, MIDDLE, 24, MIDDLE),
        _box(24, MIDDLE, 72, '3x3', colours['factor']),
        _line(96, MIDDLE, 118, MIDDLE),
        _step(128, 188, 'expand'),
        _title(361, 'trained'),
        *(part for text, y in ROWS for part in _branch(text, y, colours)),
        f'<circle cx="504" cy="{MIDDLE}" r="11" fill="none"/>',
        _text(504, MIDDLE, '+'),
        _line(515, MIDDLE, 536, MIDDLE),
        _step(548, 612, 'contract'),
        _title(680, 'deployed'),
        _line(622, MIDDLE, 644, MIDDLE),
        _box(644, MIDDLE, 72, '3x3', colours['factor']),
        _line(716, MIDDLE, 738, MIDDLE),
    ]
    style = (
        f'text {{ fill: {colours["text"]}; stroke: none; text-anchor: middle; '
        'font: 13px sans-serif; }\n'
        f'rect, circle, path {{ stroke: {colours["line"]}; stroke-width: 1.3; }}\n'
        '.step { stroke-dasharray: 5 3; }\n'
        f'.head {{ fill: {colours["line"]}; stroke: none; }}'
    )
    label = (
        'One 3x3 convolution is expanded into three branches with batch norms for training, '
        'and contracted into one 3x3 convolution afterwards.'
    )
    marker = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto">'
        '<path class="head" d="M0 0 L8 4 L0 8 Z"/></marker></defs>'
    )
    return '\n'.join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 160" width="740" '
            f'height="160" role="img" aria-label="{label}">',
            f'<style>\n{style}\n</style>',
            marker,
            *parts,
            '</svg>\n',
        ]
    )


def _branch(text: str, y: int, colours: dict[str, str]) -> list[str]:
    """Return a branch: from the input that all branches share to the sum."""
    joins = 495 if y != MIDDLE else 493
    return [
        f'<path d="M196 {MIDDLE} H216 L236 {y} H252" fill="none" marker-end="url(#arrow)"/>',
        _box(252, y, 84, text, colours['fixed' if text == 'identity' else 'factor']),
        _line(336, y, 364, y),
        _box(364, y, 84, 'batch norm', colours['norm']),
        f'<path d="M448 {y} H462 L{joins} {MIDDLE + (y > MIDDLE) * 8 - (y < MIDDLE) * 8}" '
        'fill="none" marker-end="url(#arrow)"/>',
    ]


def _box(x: int, y: int, width: int, text: str, fill: str) -> str:
    box = f'<rect x="{x}" y="{y - 14}" width="{width}" height="28" rx="4" fill="{fill}"/>'
    return box + _text(x + width // 2, y, text)


def _step(start: int, end: int, text: str) -> str:
    arrow = _line(start, MIDDLE, end, MIDDLE).replace('<path', '<path class="step"')
    return arrow + _text((start + end) // 2, MIDDLE - 13, text)


def _line(x: int, y: int, end: int, end_y: int) -> str:
    return f'<path d="M{x} {y} L{end} {end_y}" fill="none" marker-end="url(#arrow)"/>'


def _title(x: int, text: str) -> str:
    return f'<text x="{x}" y="14" font-weight="bold">{text}</text>'


def _text(x: int, y: int, text: str) -> str:
    return f'<text x="{x}" y="{y + 4.5}">{text}</text>'


if __name__ == '__main__':
    for name in THEMES:
        (FOLDER / f'diagram_{name}.svg').write_text(draw(name))
