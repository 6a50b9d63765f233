"""Draws every block from the expression that it builds: what is there is what is drawn."""

from pathlib import Path

from matplotlib.figure import Figure
from torch import nn

from mmexpand.core.blocks import BLOCKS
from mmexpand.core.expression import (
    Chain,
    Deviation,
    Filter,
    Identity,
    Norm,
    Scale,
    Separable,
    Sum,
)
from mmexpand.core.site import Site

FILLS = dict(factor='#9ecae1', fixed='#d9d9d9', scale='#fdd0a2', norm='#a1d99b', sum='#ffffff')


def boxes(node: nn.Module) -> list[tuple[str, str]]:
    """What is applied one after another in a branch: text and kind of every box."""
    if isinstance(node, Chain):
        return [box for part in node for box in boxes(part)]
    if isinstance(node, Norm):
        return [*boxes(node.node), ('BN', 'norm')]
    if isinstance(node, Scale):
        return [*boxes(node.node), ('scale', 'scale')]
    if isinstance(node, Identity):
        return [('identity', 'fixed')]
    if isinstance(node, Filter):
        height, width = node.taps.shape[2:]
        return [*boxes(node.node), (f'fixed {height}x{width}\nper channel', 'fixed')]
    if isinstance(node, Separable):
        return [*boxes(node.depthwise), *boxes(node.pointwise)]
    if isinstance(node, Deviation):
        out, inside, *_ = node.weight.shape
        return [(f'I + D\n{inside} to {out}', 'factor')]
    if isinstance(node, nn.Linear):
        return [(f'linear\n{node.in_features} to {node.out_features}', 'factor')]
    size = 'x'.join(map(str, node.kernel_size))
    kind = f'{size} per channel' if node.groups > 1 else size
    return [(f'{kind}\n{node.in_channels} to {node.out_channels}', 'factor')]


def draw(name: str) -> Figure:
    """A picture of a block in the place of a layer with 8 inputs and outputs, rate 4."""
    size = (5, 5) if name.startswith('ck') or name == 'repvgg_ck' else (3, 3)
    linear = name == 'fc'
    site = Site(8, 8, (1, 1) if linear else size, 4, padding=(1, 1), linear=linear)
    expression = BLOCKS[name].build(site)
    last = []
    if isinstance(expression, Norm) and isinstance(expression.node, Sum):
        expression, last = expression.node, [('BN', 'norm')]
    branches = [
        boxes(node) for node in (expression if isinstance(expression, Sum) else [expression])
    ]
    longest = max(len(branch) for branch in branches)
    columns = longest + 0.6
    figure = Figure(figsize=(1.4 * (columns + len(last)) + 1, 0.75 * len(branches) + 0.3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.8, columns + len(last)), ylim=(-len(branches) + 0.4, 0.6))
    axes.axis('off')
    middle, end = (1 - len(branches)) / 2, columns - 0.4
    for row, branch in enumerate(branches):
        xs = range(len(branch))
        inward = [-0.6, *(x + 0.42 for x in xs)]
        outward = [*(x - 0.42 for x in xs), end - 0.3 if len(branches) > 1 else end]
        heights = [middle, *[-row] * len(branch)], [*[-row] * len(branch), middle]
        for a, b, y, z in zip(inward, outward, *heights, strict=True):
            axes.annotate('', (b, z), (a, y), arrowprops=dict(arrowstyle='->', color='#555555'))
        for x, (text, kind) in zip(xs, branch, strict=True):
            style = dict(boxstyle='round,pad=0.35', facecolor=FILLS[kind], edgecolor='#555555')
            axes.text(x, -row, text, ha='center', va='center', fontsize=8, bbox=style)
    if len(branches) > 1:
        style = dict(boxstyle='circle,pad=0.3', facecolor=FILLS['sum'], edgecolor='#555555')
        axes.text(end, middle, '+', ha='center', va='center', fontsize=11, bbox=style)
    for text, kind in last:
        arrow = dict(arrowstyle='->', color='#555555')
        axes.annotate('', (end + 0.6, middle), (end + 0.2, middle), arrowprops=arrow)
        style = dict(boxstyle='round,pad=0.35', facecolor=FILLS[kind], edgecolor='#555555')
        axes.text(end + 0.9, middle, text, ha='center', va='center', fontsize=8, bbox=style)
    return figure


def draw_all(folder: Path) -> None:
    """Draw all blocks into a folder, as ``NAME.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in BLOCKS:
        draw(name).savefig(folder / f'{name}.svg')


if __name__ == '__main__':
    draw_all(Path('blocks'))
