"""The page of zoo.py."""

from collections import Counter
from importlib.metadata import PackageNotFoundError, version

from mmexpand.markdown import markdown_table

PACKAGES = (
    *('torch', 'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain'),
    *('timm', 'scikit-image', 'lap'),
)

FINDINGS = {
    'mmdet/solo': 'The stock network changes by 0.10 if its input changes by 1e-6.',
    'mmdet/yolact': 'The stock network changes by 0.0036 if its input changes by 1e-6.',
}
"""Findings on families that fail; relative to the largest output."""

STOCK_FAILS = 'stock network does not run on this machine'
"""Title of families whose stock network fails, for example without a GPU."""

INTRO = """\
# Supported networks

This page lists the results for one network, with random weights, of every family of mmdet's and
mmsegmentation's configs. All layers that `cl` supports are expanded at rate 1 with
`init='preserve'`. The expanded network is compared with the stock network, contracted, compared
again, and loaded into the stock network strictly. Networks are compared layer by layer and end to
end, on two drawn images. Two-stage detectors are compared up to their features, since rounding may
change the choice of proposals.

The command runs the families that have no result in `resources/zoo/`, and writes this page:

```text
python tools/analysis_tools/zoo.py
```

The networks ran on a CPU with these versions: {versions}.

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
    numbers = {
        'exact': len(by_status['exact']),
        'failed': len(by_status['failed']),
        STOCK_FAILS: len(by_status['stock']),
        'not tried': len(missing),
    }
    parts = [
        INTRO.format(versions=versions(), counts=counts(numbers)),
        _exact(by_status['exact']),
        _reasons(by_status['exact']),
        _words(
            'Failed',
            'These networks failed the comparison with the stock network, or the contraction.',
            by_status['failed'],
        ),
        _words(STOCK_FAILS.capitalize(), 'Its error messages:', by_status['stock']),
    ]
    if missing:
        parts.append(f'## Not tried yet\n\n{", ".join(missing)}\n')
    return '\n'.join(part for part in parts if part)


def counts(numbers: dict[str, int]) -> str:
    """Return a table of the numbers of families by result."""
    return markdown_table(('result', 'families'), numbers.items())


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
        '## Exact\n\nThe columns have the largest relative errors in float32: *against stock*, of '
        'the expanded network relative to the stock network, and *contracted*, of the contracted '
        f'network relative to the expanded network. The largest error is {worst:.1e}. Contracted '
        f'weights differ from the original weights by at most {weights:.1e} of the largest weight '
        f'of the tensor.\n\n{markdown_table(header, rows)}\n'
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
