"""Draw the loss and metric curves of one or more training runs."""

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mmexpand.mm.contraction import check_writable
from mmexpand.mm.launch import add_debug_argument, tool

Curve = tuple[list[int], list[float]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('runs', nargs='+', help='work dirs, or scalars.json files')
    parser.add_argument('--keys', nargs='+', help='scalars to draw, each in a plot of its own')
    parser.add_argument('--legend', nargs='+', help='names of the runs')
    parser.add_argument('--out', required=True, help='the picture')
    add_debug_argument(parser)
    args = parser.parse_args()
    kinds = figure_types()
    if Path(args.out).suffix[1:].lower() not in kinds:
        parser.error(f'--out must be a picture, one of {", ".join(kinds)}; got {args.out}')
    args.legend = args.legend or [Path(run).name for run in args.runs]
    if len(args.legend) != len(args.runs):
        parser.error(f'--legend has {len(args.legend)} names for {len(args.runs)} runs')
    return args


def figure_types() -> list[str]:
    return sorted(FigureCanvasAgg.get_supported_filetypes())


def read_curves(run: str | os.PathLike) -> dict[str, Curve]:
    """The scalars that mmengine logged in a run.

    Args:
        run: work dir, of which the latest run is taken, or scalars.json file.

    Returns:
        Steps and values of each scalar.

    Raises:
        FileNotFoundError: if there is no log.
    """
    path = Path(run)
    if path.is_dir():
        logs = sorted(path.glob('*/vis_data/scalars.json'))
        if not logs:
            raise FileNotFoundError(f'{run} holds no */vis_data/scalars.json: was it trained?')
        path = logs[-1]
    curves: dict[str, Curve] = defaultdict(lambda: ([], []))
    # A byte that is no text must not keep it from being told where.
    for number, line in enumerate(path.read_text(errors='replace').splitlines(), 1):
        try:
            scalars = json.loads(line)
            step = scalars['step']
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{path}, line {number}, is no line of scalars with a step; give a work dir, or '
                'a scalars.json of its vis_data'
            ) from None
        for key, value in scalars.items():
            curves[key][0].append(step)
            curves[key][1].append(value)
    return dict(curves)


def interesting(curves: dict[str, Curve]) -> list[str]:
    """The total loss, its parts and the main metric."""
    losses = [key for key in curves if 'loss' in key]
    metrics = [key for key in curves if key.endswith(('mAP', 'mIoU'))]
    return sorted(losses, key=lambda key: key != 'loss') + metrics


def plot_curves(
    runs: list[str], legend: list[str], out: str | os.PathLike, keys: list[str] | None = None
) -> None:
    """Draw curves of runs into a picture, one plot a scalar.

    Args:
        runs: see ``read_curves``.
        legend: a name for each.
        out: the picture.
        keys: the scalars; None: the losses and the main metric.

    Raises:
        FileNotFoundError: if a run has no log.
        ValueError: if a scalar was not logged.
    """
    curves = [read_curves(run) for run in runs]
    keys = keys or interesting(curves[0])
    if not keys:
        raise ValueError(f'{runs[0]} logged no loss and no metric; name scalars with --keys')
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.5 * columns, 3 * rows), squeeze=False, layout='constrained'
    )
    for key, axis in zip(keys, axes.flat, strict=False):
        for name, curve in zip(legend, curves, strict=True):
            if key not in curve:
                raise ValueError(f'{name} has no {key!r}; it logged {", ".join(sorted(curve))}')
            axis.plot(*curve[key], label=name, marker='o' if len(curve[key][0]) < 10 else None)
        axis.set(title=key, xlabel='step')
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(keys) :]:
        axis.axis('off')
    if len(runs) > 1:
        axes.flat[0].legend()
    figure.savefig(out)
    plt.close(figure)


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    check_writable(Path(args.out).parent, '--out')
    plot_curves(args.runs, args.legend, args.out, args.keys)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
