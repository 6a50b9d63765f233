"""Draw the gradient confusion of one or more networks (Fig. 3, middle and right).

Runs of the same name are seeds of one network: their minima are averaged, and the similarities of
their last measurements are taken together.
"""

import argparse
import json
from pathlib import Path

from plot_curves import figure_types

from mmexpand.analysis.confusion import draw
from mmexpand.mm.contraction import check_writable
from mmexpand.mm.gradient_confusion import FILE, save
from mmexpand.mm.launch import add_debug_argument, tool
from mmexpand.stack import check_installed


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='+', help='work dirs of trainings with GradientConfusionHook')
    parser.add_argument('--legend', nargs='+', help='names of the networks, one a run')
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


def read(run: str) -> list[dict]:
    path = Path(run) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f'{run} holds no {FILE}: was it trained with GradientConfusionHook?'
        )
    try:
        return json.loads(path.read_text())['measured']
    except (ValueError, KeyError):
        raise ValueError(f'{path} is no file of GradientConfusionHook; train anew') from None


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    check_installed('the density', 'scipy')
    check_writable(Path(args.out).parent, '--out')
    runs: dict[str, list] = {}
    for name, run in zip(args.legend, args.runs, strict=True):
        runs.setdefault(name, []).append(read(run))
    save(draw(runs), Path(args.out))
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
