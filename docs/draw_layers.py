"""Draw the layers of the package and their imports: ``python docs/draw_layers.py``.

The edges are the table that tests/test_layering.py enforces.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

LAYERS = {
    'study': 'learning rates, seeds, statistics, reports',
    'deploy': 'ONNX, int8, torch.export, ncnn',
    'mm': 'hooks, builders, optimizer, compact config',
    'analysis': 'costs, benchmarks, loss landscapes',
    'surgery': 'plan, expand, contract, verify, files',
    'core': 'algebra, expressions, blocks, units',
    'models': 'SmallNet, YOLO-LITE, YOLOv2 head',
    'report': 'pages of runs and of studies',
}
"""Layers with their content, from the top; a layer imports layers below it only."""

FILE = Path(__file__).parent / 'layers.svg'

STEP, ROW, HEIGHT, WIDTH, PORT = 34, 46, 30, 370, 15
"""Pixels: indent by layer, distance of rows, size of a box, where its line leaves it."""

STYLE = (
    'path{stroke:#7d8590;stroke-width:1.3;fill:none}'
    'rect{fill:#9ecae1;stroke:#57606a}'
    'text{font:13px sans-serif;fill:#1f2328}'
    'circle,.head{fill:#7d8590;stroke:none}'
    '.name{font-weight:bold}'
)


def draw(imports: Mapping[str, set[str]]) -> str:
    """Return the picture as an SVG document: a dot for each import of a layer by another.

    Args:
        imports: the layers that each layer may import; itself among them or not.

    Raises:
        ValueError: if a layer is missing in ``LAYERS``, or imports one above it.
    """
    names = list(LAYERS)
    if set(names) != set(imports):
        raise ValueError(f'layers differ: {sorted(set(names) ^ set(imports))}')
    edges = {(a, b) for a in names for b in imports[a] if a != b}
    upwards = [edge for edge in edges if names.index(edge[0]) > names.index(edge[1])]
    if upwards:
        raise ValueError(f'imports point up: {upwards}; change the order of LAYERS')
    width, height = STEP * (len(names) - 1) + WIDTH + 4, ROW * (len(names) - 1) + HEIGHT + 4
    marks = []
    for index, (name, content) in enumerate(LAYERS.items()):
        x, y = 2 + STEP * index, 2 + ROW * index
        down = [names.index(b) for a, b in edges if a == name]
        up = [names.index(a) for a, b in edges if b == name]
        if down:
            marks.append(
                f'<path d="M{x + PORT} {y + HEIGHT}V{2 + ROW * max(down) + HEIGHT // 2}"/>'
            )
        if up:
            start = 2 + STEP * min(up) + PORT
            marks.append(f'<path d="M{start} {y + HEIGHT // 2}H{x}" marker-end="url(#a)"/>')
        marks.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4"/>')
        marks.append(f'<text class="name" x="{x + 10}" y="{y + 20}">{name}</text>')
        marks.append(f'<text x="{x + 80}" y="{y + 20}">{content}</text>')
    for importer, imported in sorted(edges):
        x = 2 + STEP * names.index(importer) + PORT
        y = 2 + ROW * names.index(imported) + HEIGHT // 2
        marks.append(f'<circle data-edge="{importer} {imported}" cx="{x}" cy="{y}" r="4"/>')
    return '\n'.join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" '
            'aria-label="layers of mmexpand and their imports">',
            f'<style>{STYLE}</style>',
            '<defs><marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path class="head" d="M0 0L8 4L0 8Z"/></marker></defs>',
            *marks,
            '</svg>\n',
        ]
    )


if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.test_layering import ALLOWED

    FILE.write_text(draw(ALLOWED))
