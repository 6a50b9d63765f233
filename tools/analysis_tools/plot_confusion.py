"""Draw the gradient confusion of one or more networks (Fig. 3, middle and right).

Runs of the same name are seeds of one network: their minima are averaged, and the similarities of
their last measurements are pooled.
"""

import argparse
import json
from pathlib import Path

from plot_curves import parse_runs

from mmexpand.analysis.confusion import draw
from mmexpand.errors import UserFileNotFoundError, UserValueError
from mmexpand.files import save_figure
from mmexpand.mm.command_line import tool
from mmexpand.mm.contraction import check_writable
from mmexpand.mm.gradient_confusion import FILE
from mmexpand.stack import check_installed


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='+', help='work dirs of trainings with GradientConfusionHook')
    parser.add_argument('--legend', nargs='+', help='names of the networks, one per run')
    return parse_runs(parser)


def read(run: str) -> list[dict]:
    path = Path(run) / FILE
    if not path.is_file():
        raise UserFileNotFoundError(
            f'{run} holds no {FILE}; name the work dir of a training with GradientConfusionHook'
        )
    try:
        return json.loads(path.read_text())['measured']
    except (ValueError, KeyError):
        raise UserValueError(
            f'{path} is not a file of GradientConfusionHook; train again'
        ) from None


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    check_installed('the density', 'scipy')
    check_writable(Path(args.out).parent, '--out')
    runs: dict[str, list] = {}
    for name, run in zip(args.legend, args.runs, strict=True):
        runs.setdefault(name, []).append(read(run))
    save_figure(draw(runs), Path(args.out))
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
