"""Plans as text: a table of the layers to expand, and the skipped layers by reason."""

import posixpath
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from .layer_plan import LayerPlan, SkippedLayer

WIDTH = 100
"""Largest width of the text in characters, unless a layer's name is longer."""


def describe_plan(
    parts: Iterable[tuple[str, Iterable[LayerPlan], Iterable[SkippedLayer]]],
    columns: Sequence[str] = (),
    cells: Mapping[str, Sequence[str]] | None = None,
    notes: Mapping[str, str] | None = None,
) -> str:
    """Return the expanded and skipped layers of plans as text, at most 100 characters wide.

    Args:
        parts: for each plan the name of its submodule ('' for the whole model), its layers and
            its skipped layers.
        columns: titles of additional columns of numbers.
        cells: numbers of these columns, by layer; '-' where a layer has none.
        notes: remarks behind the factors, by layer.
    """
    header = ['layer', 'method', 'params', 'expanded', *columns]
    rows, below, skipped = [], [], {}
    for part, layers, skipped_layers in parts:
        for layer in layers:
            name = f'{part}.{layer.name}'.lstrip('.')
            factors = ' '.join('x'.join(map(str, shape)) for shape in layer.factor_shapes)
            counts = f'{layer.params_before:,}', f'{layer.params_after:,}'
            own = (cells or {}).get(name, ['-'] * len(columns))
            rows.append([name, layer.label, *counts, *own])
            below.append('; '.join(filter(None, (factors, (notes or {}).get(name)))))
        for layer in skipped_layers:
            name = f'{part}.{layer.name}'.lstrip('.')
            top = name.split('.')[0] if '.' in name else ''
            skipped.setdefault((top, layer.reason), []).append(name)
    return '\n'.join([*_table(header, rows, below), *_skipped(skipped)])


def _table(header: list[str], rows: list[list[str]], below: list[str]) -> list[str]:
    """Return a table of two columns of text and columns of numbers, with a text below each row."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(widths[1:]))

    def line(row: list[str]) -> list[str]:
        texts = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        if len(row[0]) > widths[0]:  # A separate line keeps the name in one piece.
            return [row[0], '  '.join([' ' * widths[0], *texts[1:], *numbers])]
        return ['  '.join([*texts, *numbers])]

    lines = line(header)
    for row, text in zip(rows, below, strict=True):
        lines += [*line(row), *_wrapped(text)]
    return lines


def _wrapped(text: str) -> list[str]:
    indent = ' ' * 4
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _skipped(groups: Mapping[tuple[str, str], list[str]]) -> list[str]:
    lines = ['skipped:'] if groups else []
    for (top, reason), names in groups.items():
        if top and len(names) > 1:
            common = posixpath.commonpath([name.replace('.', '/') for name in names])
            names = [f'{common.replace("/", ".")} ({len(names)} layers)']
        lines += _wrapped(f'{", ".join(names)}: {reason}')
    return lines
