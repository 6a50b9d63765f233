"""Draw the loss and metric curves of one or more training runs."""

import argparse
import os
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mmexpand.errors import UserValueError
from mmexpand.files import save_figure
from mmexpand.metrics import is_main
from mmexpand.mm.command_line import add_debug_argument, tool
from mmexpand.mm.contraction import check_writable
from mmexpand.report.curves import read_log


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('runs', nargs='+', help='work dirs, or scalars.json files')
    parser.add_argument('--keys', nargs='+', help='scalars to draw, one plot per scalar')
    parser.add_argument('--legend', nargs='+', help='names of the runs')
    return parse_runs(parser)


def parse_runs(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the arguments: ``runs``, a name for each in ``legend``, and the picture."""
    parser.add_argument('--out', required=True, help='the picture')
    add_debug_argument(parser)
    args = parser.parse_args()
    kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
    if Path(args.out).suffix[1:].lower() not in kinds:
        parser.error(f'--out must be a picture, one of {", ".join(kinds)}; got {args.out}')
    args.legend = args.legend or [Path(run).name for run in args.runs]
    if len(args.legend) != len(args.runs):
        parser.error(f'--legend has {len(args.legend)} names for {len(args.runs)} runs')
    return args


def plot_curves(
    runs: list[str], legend: list[str], out: str | os.PathLike, keys: list[str] | None = None
) -> None:
    """Draw curves of runs into a picture, one plot per scalar.

    Args:
        runs: see ``read_log``.
        legend: names of the runs.
        out: the picture.
        keys: the scalars; None: the losses and the main metric.

    Raises:
        FileNotFoundError: if a run has no log.
        ValueError: if a scalar was not logged.
    """
    logs = [read_log(run) for run in runs]
    keys = keys or [*logs[0].losses, *filter(is_main, logs[0].metrics)]
    curves = [log.evaluations | log.training for log in logs]
    if not keys:
        raise UserValueError(f'{runs[0]} logged no loss and no metric; name scalars with --keys')
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.5 * columns, 3 * rows), squeeze=False, layout='constrained'
    )
    for key, axis in zip(keys, axes.flat, strict=False):
        for name, curve in zip(legend, curves, strict=True):
            if key not in curve:
                raise UserValueError(f'{name} has no {key!r}; it logged {", ".join(sorted(curve))}')
            axis.plot(*curve[key], label=name, marker='o' if len(curve[key][0]) < 10 else None)
        axis.set(title=key, xlabel='step')
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(keys) :]:
        axis.axis('off')
    if len(runs) > 1:
        axes.flat[0].legend()
    save_figure(figure, Path(out))
    plt.close(figure)


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    check_writable(Path(args.out).parent, '--out')
    plot_curves(args.runs, args.legend, args.out, args.keys)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
