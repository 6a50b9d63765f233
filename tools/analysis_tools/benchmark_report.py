"""Tables, JSON and plot of benchmark_training.py."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from mmexpand.analysis.benchmark import GroupResult, VariantResult
from mmexpand.analysis.cases import COMPACT, OURS
from mmexpand.analysis.steps import Settings
from mmexpand.files import save_figure, write_text
from mmexpand.markdown import markdown_table

COLORS = {
    'layerwise': '#b0b7c3',
    'folded': '#5b9bd5',
    'auto': '#1f4e79',
    'OREPA': '#7fb069',
    'DO-Conv': '#4f7942',
    'RepVGG folded': '#f7dd8d',
    'DBB folded': '#d79a8b',
    'RepVGG': '#f2c14e',
    'ACNet': '#e08e45',
    'DBB': '#b5533c',
}

NOTES = """\
Step: one training step (forward, backward, SGD with momentum 0.9 and weight decay 0.0005, \
{optimizer}); ratio to the compact network's step: of the minima of many steps (of the medians). \
All variants of a row take turns in one process. Bound: the compact step measured, plus the \
multiply-accumulate operations of the factors' products at the rate of a large matrix product, \
plus the memory traffic of the additional parameters' gradients and optimizer state at the \
bandwidth of a large copy, both rates measured in the same run. Saved: bytes kept for backward \
besides parameters; those of folding are computed from parameters alone. Peak: peak resident \
memory of a process that trains this variant alone, over what the loaded libraries take, freed \
blocks being handed back at once; on a GPU what PyTorch allocates there at most. Reduced: bytes of \
gradients each process hands to the all-reduce in a step, of plain DDP and where the gradients \
of folded kernels are reduced in the \
place of their factors'."""


def machine(device: str = 'cpu') -> dict:
    """Return the properties of the machine that times depend on."""
    return dict(
        device='CPU' if device == 'cpu' else torch.cuda.get_device_name(device),
        processor=_processor(),
        cores=os.cpu_count(),
        capability=torch.backends.cpu.get_cpu_capability(),
        platform=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
    )


def _processor() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def group_table(group: GroupResult) -> Table:
    """Return the table of one case and rate, for the terminal."""
    table = Table(
        title=f'{_title(group)}, input {_shape(group.input_shape)}', caption=_bound(group)
    )
    table.add_column('', no_wrap=True)
    for column in _DETAILS:
        table.add_column(column, justify='right')
    for name in group.variants:
        table.add_row(name, *_details(group, name))
    for name, reason in group.left_out.items():
        table.add_row(name, f'left out: {reason}')
    return table


_DETAILS = (
    'steps',
    'step, ms',
    'ratio (medians)',
    'forward',
    'backward',
    'optimizer',
    'parameters',
    'saved, MB',
    'to compact',
    'of folding',
    'peak, MB',
    'reduced, MB',
    'compact-size',
)


def _details(group: GroupResult, name: str) -> list[str]:
    result = group.variants[name]
    footprint, compact = result.footprint, group.variants[COMPACT].footprint
    return [
        str(result.steps),
        _ms(result.step.min),
        _ratio(result),
        _ms(result.forward.min),
        _ms(result.backward.min),
        _ms(result.optimizer.min),
        f'{footprint.parameters:,}',
        _mb(footprint.saved.activations),
        f'{footprint.saved.activations / compact.saved.activations:.3f}',
        _mb(footprint.saved.folding),
        _mb(footprint.peak_memory),
        _mb(footprint.reduced.ddp),
        _mb(footprint.reduced.compact_size),
    ]


def _bound(group: GroupResult) -> str:
    lines = []
    if group.bound:
        bound, folded = group.bound, group.variants['folded']
        lines.append(
            f'Bound of folded: {bound.ratio:.3f} (products {bound.products * 1e3:.1f} ms at '
            f'{bound.rates.gemm / 1e9:.0f} GFLOP/s, parameters {bound.traffic * 1e3:.1f} ms at '
            f'{bound.rates.bandwidth / 1e9:.1f} GB/s); measured {folded.ratio.min:.3f}, '
            f'{folded.ratio.min / bound.ratio:.2f} times the bound'
        )
    if group.counted:
        ratios = ', '.join(f'{name} {group.counted.ratio(name):.3f}' for name in OURS)
        lines.append(f'Counted at {_shape(group.counted.input_shape)}: {ratios}')
    return '\n'.join(lines)


def write_report(
    out_dir: Path, machine: dict, settings: Settings, groups: Sequence[GroupResult]
) -> None:
    """Write benchmark.json, benchmark.md and benchmark.png, each whole or not at all.

    Args:
        out_dir: an existing directory.
        machine: the properties of the machine.
        settings: the settings of the measurement.
        groups: the results.
    """
    record = dict(machine=machine, settings=asdict(settings), groups=[_record(g) for g in groups])
    write_text(json.dumps(record, indent=2) + '\n', out_dir / 'benchmark.json')
    write_text(markdown(machine, settings, groups), out_dir / 'benchmark.md')
    figure = plot(groups)
    save_figure(figure, out_dir / 'benchmark.png')
    plt.close(figure)


def _record(group: GroupResult) -> dict:
    """Return the content of the JSON: seconds, bytes, ratios of minima and medians."""
    record = asdict(group)
    if group.bound:
        record['bound']['ratio'] = group.bound.ratio
        record['bound']['measured_to_bound'] = (
            group.variants['folded'].ratio.min / group.bound.ratio
        )
    if group.counted:
        record['counted']['ratios'] = {name: group.counted.ratio(name) for name in OURS}
    return record


def markdown(machine: dict, settings: Settings, groups: Sequence[GroupResult]) -> str:
    """Return the tables for docs/cost.md."""
    parts = [_step_table(groups), _counted_table(groups), _peer_table(groups)]
    parts += [_detail_table(groups), NOTES.format(optimizer=settings.optimizer)]
    rates = [group.bound.rates for group in groups if group.bound]
    reached = (
        f'; {max(r.gemm for r in rates) / 1e9:.0f} GFLOP/s, '
        f'{max(r.bandwidth for r in rates) / 1e9:.1f} GB/s'
        if rates
        else ''
    )
    if machine['device'] == 'CPU':
        where = f'{machine["processor"]} ({machine["capability"]}), {settings.threads} threads'
    else:
        where = f'{machine["device"]}{", mixed precision" if settings.amp else ""}'
    parts.append(f'Measured on {where}, torch {machine["torch"]}{reached}.')
    return '\n\n'.join(part for part in parts if part) + '\n'


def _step_table(groups: Sequence[GroupResult]) -> str:
    head = ('network', 'input', 'r', 'compact, ms', *OURS, 'bound of folded', 'folded / bound')
    rows = []
    for group in groups:
        bound = (
            (f'{group.bound.ratio:.2f}', f'{_ratio_to_bound(group):.2f}') if group.bound else '--'
        )
        ours = [_ratio(group.variants[n]) if n in group.variants else 'left out' for n in OURS]
        compact = _ms(group.variants[COMPACT].step.min)
        rows.append([group.case, _shape(group.input_shape), _rate(group), compact, *ours, *bound])
    return markdown_table(head, rows)


def _ratio_to_bound(group: GroupResult) -> float:
    return group.variants['folded'].ratio.min / group.bound.ratio


def _counted_table(groups: Sequence[GroupResult]) -> str:
    counted = [group for group in groups if group.counted]
    if not counted:
        return ''
    head = ('operations, counted', 'input', 'r', 'compact, GMAC', *OURS)
    rows = [
        [
            group.case,
            _shape(group.counted.input_shape),
            _rate(group),
            f'{group.counted.compact / 1e9:.1f}',
            *(f'{group.counted.ratio(name):.3f}' for name in OURS),
        ]
        for group in counted
    ]
    return markdown_table(head, rows)


def _peer_table(groups: Sequence[GroupResult]) -> str:
    peers = sorted({n for g in groups for n in g.variants} - {COMPACT, *OURS}, key=_place)
    with_peers = [group for group in groups if set(peers) & set(group.variants)]
    if not peers:
        return ''
    head = ('peers in the same run', 'r', 'folded', 'auto', *peers)
    rows = []
    for group in with_peers:
        results = [group.variants.get(name) for name in ('folded', 'auto', *peers)]
        ratios = [_ratio(result) if result else 'left out' for result in results]
        rows.append([group.case, _rate(group), *ratios])
    return markdown_table(head, rows)


def _detail_table(groups: Sequence[GroupResult]) -> str:
    rows = [
        [group.case, _rate(group), name, *_details(group, name)]
        for group in groups
        for name in group.variants
    ]
    return markdown_table(('network', 'r', 'variant', *_DETAILS), rows)


def plot(groups: Sequence[GroupResult]) -> Figure:
    """Plot the step relative to compact: one panel per rate, one cluster per case."""
    rates = sorted({group.rate for group in groups}, key=lambda rate: rate or 0)
    most = max(sum(len(g.variants) for g in groups if g.rate == rate) for rate in rates)
    figure, panels = plt.subplots(
        len(rates),
        1,
        figsize=(max(7, 0.45 * most), 2.4 * len(rates) + 0.8),
        sharey=True,
        squeeze=False,
        layout='constrained',
    )
    for axes, rate in zip(panels[:, 0], rates, strict=True):
        _draw_rate(axes, [group for group in groups if group.rate == rate])
        axes.set_title('' if rate is None else f'r = {rate:g}', loc='left', fontsize=10)
        axes.set_ylabel('step / compact step')
    largest = max(result.ratio.min for group in groups for result in group.variants.values())
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if tick <= largest]
    axes.set_ylim(0.5, 1.6 * largest)
    axes.set_yticks(ticks, [f'{tick:g}' for tick in ticks])
    axes.minorticks_off()
    labels = {
        label: handle
        for axes in panels[:, 0]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = min(len(labels), 7 if most > 18 else 4)
    figure.legend(labels.values(), labels, loc='outside upper center', ncols=columns, frameon=False)
    return figure


def _draw_rate(axes: Axes, groups: Sequence[GroupResult]) -> None:
    left, ticks = 0.0, []
    for group in groups:
        names = sorted(set(group.variants) - {COMPACT}, key=_place)
        for index, name in enumerate(names):
            ratio = group.variants[name].ratio.min
            bars = axes.bar(left + index, ratio, 0.85, color=COLORS[name], label=name, zorder=2)
            axes.bar_label(bars, [f'{ratio:.2f}' if ratio < 10 else f'{ratio:.1f}'], fontsize=8)
            if name == 'folded' and group.bound:
                ends = left + index - 0.42, left + index + 0.42
                axes.hlines(
                    group.bound.ratio, *ends, 'black', lw=1.5, zorder=3, label='bound of folded'
                )
        ticks.append((left + (len(names) - 1) / 2, group.case))
        left += len(names) + 1
    axes.axhline(1, color='grey', lw=0.8)
    axes.set_yscale('log')
    axes.set_xticks(*zip(*ticks, strict=True))
    axes.tick_params(axis='x', length=0)
    axes.spines[['top', 'right']].set_visible(False)


def _place(variant: str) -> int:
    return list(COLORS).index(variant)


def _title(group: GroupResult) -> str:
    return f'{group.case}, r = {_rate(group)}'


def _rate(group: GroupResult) -> str:
    return 'as configured' if group.rate is None else f'{group.rate:g}'


def _shape(shape: Sequence[int]) -> str:
    return 'x'.join(map(str, shape))


def _ratio(result: VariantResult) -> str:
    return f'{result.ratio.min:.2f} ({result.ratio.median:.2f})'


def _ms(seconds: float) -> str:
    return f'{seconds * 1e3:,.1f}'


def _mb(size: int) -> str:
    return f'{size / 1e6:,.1f}'
