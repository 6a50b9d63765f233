"""Export a network of every family of mmdet's and mmseg's configs to ONNX; write the page.

Each family runs in a separate process and gives one JSON; existing ones are not run again.
"""

import argparse
import math
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import zoo_network
from torch import Tensor, nn
from zoo import add_arguments, run_families
from zoo_page import FINDINGS, STOCK_FAILS, counts, versions

from mmexpand.deploy import export_onnx
from mmexpand.deploy.decoding import check_exportable
from mmexpand.markdown import markdown_table
from mmexpand.mm.command_line import tool

TOLERANCE = 1e-3
"""Largest relative error allowed: random weights amplify rounding from layer to layer."""

PAGE = """\
# Export of every family

This page lists the ONNX exports of one network, with random weights, of every family of mmdet's and
mmsegmentation's configs. The files have a dynamic batch and, if possible, the decoding. Raw outputs
of ONNX Runtime are compared with PyTorch's for one image and for two, and the predictions with the
framework's. Segmentors that the config runs in sliding windows are run on the whole image
(`model.test_cfg.mode=whole`).

The command exports the families that have no result in `resources/zoo_export/`, and writes this
page:

```text
python tools/analysis_tools/zoo_export.py
```

The exports ran on a CPU with these versions: {versions}.

{counts}
"""
SECTIONS = {
    'works': ('Works', 'The file returns predictions.'),
    'raw': ('Works with `--raw`', 'The file returns the outputs of the heads.'),
    'refused': ('Unsupported', 'No file is written.'),
    'stock': (STOCK_FAILS.capitalize(), 'Its error messages:'),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, Path('resources/zoo_export'), Path('docs/exported_networks.md'))
    return parser.parse_args()


def outcome(family: str) -> dict[str, Any]:
    """Return the stage that a family's export reaches, a key of ``SECTIONS``, and the reason."""
    try:
        name, model, side, batch = zoo_network.stock_network(family)
    except zoo_network.StockError as error:
        return dict(status='stock', error=str(error))
    found = dict(config=name, side=side)
    zoo_network.say('exporting')
    try:
        check_exportable(model)
        inputs = model.data_preprocessor(batch, False)['inputs'][:1]
    except Exception as error:  # A data preprocessor can raise any error.
        return dict(**found, status='refused', error=in_words(error))
    if getattr(model, 'test_cfg', None) and model.test_cfg.get('mode') == 'slide':
        model.test_cfg['mode'] = 'whole'
    model.eval()
    try:
        return dict(**found, **export(model, inputs, raw=False), status='works')
    except Exception as error:
        reason = in_words(error)
    zoo_network.say('exporting raw outputs')
    try:
        return dict(**found, **export(model, inputs, raw=True), status='raw', error=reason)
    except Exception as error:
        return dict(**found, status='refused', error=in_words(error))


def export(model: nn.Module, inputs: Tensor, raw: bool) -> dict[str, Any]:
    """Export a network, and return the error of the file."""
    with TemporaryDirectory() as folder:
        report = export_onnx(model, inputs, Path(folder) / 'network.onnx', TOLERANCE, raw=raw)
    return dict(error_raw=report.max_error, agreement=report.agreement)


def in_words(error: Exception) -> str:
    """Return the first sentence of an error."""
    words = ' '.join(str(error).split()).split('; /tmp')[0]
    return words if len(words) <= 240 else words[:237] + '...'


def page(results: list[dict], missing: list[str]) -> str:
    """Return the page as Markdown.

    Args:
        results: results of ``outcome`` by family.
        missing: families that were not run yet.
    """
    # A killed process leaves no status.
    status = {r['family']: 'refused' if r['status'] == 'failed' else r['status'] for r in results}
    reached = list(status.values())
    numbers = {title: reached.count(key) for key, (title, _) in SECTIONS.items()}
    numbers['Not tried'] = len(missing)
    parts = [PAGE.format(versions=versions(), counts=counts(numbers))]
    for key, (title, intro) in SECTIONS.items():
        rows = [_row(result) for result in results if status[result['family']] == key]
        if rows:
            header = ('config', 'input', 'error', 'predictions', 'reason')
            parts.append(f'## {title}\n\n{intro}\n\n{markdown_table(header, rows)}\n')
    if missing:
        parts.append(f'## Not tried yet\n\n{", ".join(missing)}\n')
    return '\n'.join(parts)


def _row(result: dict) -> tuple:
    error, agreement = result.get('error_raw'), result.get('agreement')
    return (
        f'`{result.get("config", result["family"])}`',
        result.get('side', ''),
        '' if error is None else f'{error:.1e}',
        '' if agreement is None or math.isnan(agreement) else f'{agreement:.2%}',
        f'{result.get("error", "")} {FINDINGS.get(result["family"], "")}'.strip(),
    )


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    run_families(args, partial(zoo_network.main, outcome=outcome), page)


if __name__ == '__main__':
    main()
