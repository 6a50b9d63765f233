"""Time one training step: compact, the paper's chain, folded, auto, and peers, in turns.

The loss is the mean square of the raw outputs (mode='tensor' of a config's model) on random images.
The optimizer is SGD with momentum and weight decay. Both are the same for all variants.
"""

import argparse
from pathlib import Path

import torch
from benchmark_cases import BUILT_IN, config_case
from benchmark_report import group_table, machine, write_report
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mmexpand.analysis.benchmark import run_group
from mmexpand.analysis.cases import Case
from mmexpand.analysis.steps import OPTIMIZERS, Settings
from mmexpand.core.layer_spec import check_rate
from mmexpand.mm.command_line import add_config_arguments, count, device, read_config, tool
from mmexpand.mm.contraction import check_writable


def parse_args() -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        '--case', nargs='+', choices=BUILT_IN, default=list(BUILT_IN), help='built-in cases'
    )
    what.add_argument('--config', help='instead, a config with ExpandHook or a builder')
    add_config_arguments(parser)
    parser.add_argument(
        '--batch-size', type=count, default=2, help='with --config: images per step'
    )
    parser.add_argument(
        '--shape',
        type=count,
        nargs=2,
        default=[512, 512],
        help='with --config: height and width',
    )
    parser.add_argument(
        '--rates',
        type=float,
        nargs='+',
        help="expansion rates (default: 2 4 8; with --config: the config's rate)",
    )
    parser.add_argument(
        '--steps', type=count, default=defaults.steps, help='timed steps of each variant'
    )
    parser.add_argument(
        '--warmup', type=int, default=defaults.warmup, help='untimed steps before the timed steps'
    )
    parser.add_argument(
        '--budget',
        type=float,
        default=defaults.budget,
        help='seconds for the steps of a variant; slow ones do fewer steps',
    )
    parser.add_argument('--threads', type=count, default=defaults.threads, help="torch's threads")
    parser.add_argument(
        '--optimizer',
        choices=OPTIMIZERS,
        default=defaults.optimizer,
        help='implementation of SGD (default: %(default)s)',
    )
    parser.add_argument(
        '--device', type=device, default=defaults.device, help='default: %(default)s'
    )
    parser.add_argument('--amp', action='store_true', help='run forwards in mixed precision')
    parser.add_argument(
        '--out-dir', type=Path, help='write benchmark.json, benchmark.md and benchmark.png here'
    )
    return parser.parse_args()


def find_cases(args: argparse.Namespace) -> tuple[list[Case], list[float | None]]:
    if not args.config:
        return [BUILT_IN[name] for name in args.case], args.rates or [2, 4, 8]
    cfg = read_config(args, 'model')
    return [config_case(args.config, cfg, args.batch_size, args.shape)], args.rates or [None]


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    settings = Settings(
        args.steps,
        args.warmup,
        args.budget,
        args.threads,
        args.optimizer,
        args.device,
        args.amp,
    )
    cases, rates = find_cases(args)
    for rate in args.rates or ():
        check_rate(rate)
    if args.out_dir:
        check_writable(args.out_dir, '--out-dir')
    torch.set_num_threads(settings.threads)
    console = Console(width=None if Console().is_terminal else 200)
    groups = []
    columns = TextColumn('{task.description}'), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task('')
        for case, rate in [(case, rate) for case in cases for rate in rates]:
            title = case.name if rate is None else f'{case.name}, r = {rate:g}'

            def progress(what: str, done: int, total: int, title: str = title) -> None:
                bar.update(task, description=f'{title}: {what}', completed=done, total=total)

            groups.append(run_group(case, rate, settings, progress))
            console.print(group_table(groups[-1]))
            if args.out_dir:
                write_report(args.out_dir, machine(args.device), settings, groups)
    if args.out_dir:
        console.print(f'Written to {args.out_dir}: benchmark.json, benchmark.md, benchmark.png')


if __name__ == '__main__':
    main()
