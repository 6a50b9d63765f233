"""The page of zoo.py."""

from collections import Counter
from importlib.metadata import PackageNotFoundError, version

from mmexpand.markdown import markdown_table

PACKAGES = (
    *('torch', 'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain'),
    *('timm', 'scikit-image', 'lap'),
)

FINDINGS = {
    'mmdet/solo': 'Stock changes by 0.10 where its input does by 1e-6.',
    'mmdet/yolact': 'Stock changes by 0.0036 where its input does by 1e-6.',
}
"""Findings on families that fail; relative to the largest output."""

INTRO = """\
# Supported networks

A network of every family of mmdet's and mmsegmentation's own configs was tried with random
weights. All layers that `cl` supports are expanded at rate 1 with `init='preserve'`, compared with
the stock network, contracted, compared again, and loaded into the stock network strictly. Networks
are compared layer by layer and end to end, on two drawn images; two-stage detectors are compared up
to their features, since rounding may change the choice of proposals.

```text
python tools/analysis_tools/zoo.py
```

continues with the missing families in `resources/zoo/`, and writes this page. On a CPU, with
{versions}.

{counts}
"""


def page(results: list[dict], missing: list[str]) -> str:
    """Return the page as Markdown.

    Args:
        results: results of zoo_network.py, one per family.
        missing: families that were not run yet.
    """
    by_status = {
        status: [result for result in results if result['status'] == status]
        for status in ('exact', 'failed', 'stock')
    }
    counts = (
        f'Of {len(results) + len(missing)} families {len(by_status["exact"])} are exact, '
        f'{len(by_status["failed"])} fail, {len(by_status["stock"])} do not run stock on this '
        'machine' + (f', {len(missing)} have not been tried.' if missing else '.')
    )
    parts = [
        INTRO.format(versions=versions(), counts=counts),
        _exact(by_status['exact']),
        _reasons(by_status['exact']),
        _words(
            'Fail',
            'The comparison with stock or the contraction; no wrong layer is named with "0 of".',
            by_status['failed'],
        ),
        _words('Not run stock', 'Error messages of the stock network.', by_status['stock']),
    ]
    if missing:
        parts.append(f'## Not tried yet\n\n{", ".join(missing)}\n')
    return '\n'.join(part for part in parts if part)


def versions() -> str:
    """Return the versions of the installed packages."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f'{package} {version(package)}')
        except PackageNotFoundError:
            found.append(f'no {package}')
    return ', '.join(found)


def _exact(results: list[dict]) -> str:
    if not results:
        return ''
    header = ('config', 'input', 'layers', 'skipped', 'parameters', 'expanded')
    header += ('against stock', 'contracted', 'compared', 'layers verified')
    rows = [
        (
            f'`{result["config"]}`',
            result['side'],
            result['layers'],
            sum(result['skipped'].values()),
            f'{result["params_before"]:,}',
            f'{result["params_after"]:,}',
            f'{result["error_expanded"]:.1e}',
            f'{result["error_contracted"]:.1e}',
            result['compared'],
            ', '.join(f'{count} {how}' for how, count in result['verified_on'].items()),
        )
        for result in results
    ]
    worst = max(max(r['error_expanded'], r['error_contracted']) for r in results)
    weights = max(result['error_weights'] for result in results)
    return (
        f'## Exact\n\nLargest relative errors, in float32: of the expanded network against stock, '
        f'and of the contracted one against the expanded one. The largest of all is {worst:.1e}; '
        f'no contracted weight differs from the original one by more than '
        f'{weights:.1e} of the largest in its tensor.\n\n{markdown_table(header, rows)}\n'
    )


def _reasons(results: list[dict]) -> str:
    layers, families = Counter(), Counter()
    for result in results:
        layers.update(result['skipped'])
        families.update(result['skipped'].keys())
    if not layers:
        return ''
    rows = ((reason, families[reason], count) for reason, count in layers.most_common())
    found = markdown_table(('reason', 'families', 'layers'), rows)
    return f'## Skipped layers, with reasons\n\n{found}\n'


def _words(title: str, intro: str, results: list[dict]) -> str:
    if not results:
        return ''
    rows = ((r['family'], r['error'], FINDINGS.get(r['family'], '')) for r in results)
    found = markdown_table(('family', 'error', 'finding'), rows)
    return f'## {title}\n\n{intro}\n\n{found}\n'
