"""Compare configs, or a config with and without blocks: tune each, train all seeds, report.

python tools/study.py configs/study/camvid_unet.py
python tools/study.py CONFIG --methods bn repvgg --lrs 0.01 0.02 0.05 --seeds 3
"""

import argparse
import math
import signal
import sys
from pathlib import Path

from mmexpand.errors import UserValueError
from mmexpand.mm.command_line import (
    add_config_arguments,
    add_expansion_arguments,
    count,
    expansion_of,
    tool,
)
from mmexpand.mm.contraction import check_writable
from mmexpand.study import Study, load_study, run_study, write_report
from mmexpand.study.one_config import OneConfig, best_checkpoint, study_of
from mmexpand.study.report import missing_for_page
from mmexpand.study.results import load_result, score

ONE_CONFIG = (
    'metric',
    'lrs',
    'include',
    'exclude',
    'rate',
    'forward',
    'cfg_options',
    'jobs',
    'name',
)
"""Options that go with ``--methods``."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'study', metavar='STUDY_OR_CONFIG', help='study file, or with --methods a training config'
    )
    parser.add_argument(
        '--seeds',
        nargs='+',
        type=int,
        help='seeds to run (default: all); with --methods: how many, or which (default: those of '
        'the study so far, or 3)',
    )
    parser.add_argument(
        '--minutes', type=float, default=math.inf, help='start no run later than this'
    )
    parser.add_argument('--report-only', action='store_true', help='report the results so far')
    parser.add_argument('--out-dir', help='folder of the report (default: work_dirs/STUDY)')
    parser.add_argument('--arms', nargs='+', help='arms of a study file to run (default: all)')
    one = parser.add_argument_group('without a study file')
    one.add_argument('--methods', nargs='+', help='blocks to compare with the compact network')
    one.add_argument('--metric', help="metric to compare by (default: the evaluator's main one)")
    one.add_argument(
        '--lrs',
        nargs='+',
        type=float,
        help='learning rates to try (default: those of the study so far, or a search by factors 2)',
    )
    one.add_argument('--jobs', type=count, help='runs at a time (default: 1)')
    one.add_argument('--name', help='name of the study (default: CONFIG_study)')
    add_expansion_arguments(parser, 'include', 'exclude', 'rate', 'forward')
    add_config_arguments(parser)
    args = parser.parse_args()
    if args.methods is None and any(getattr(args, key) is not None for key in ONE_CONFIG):
        given = [key for key in ONE_CONFIG if getattr(args, key) is not None]
        option = '--' + given[0].replace('_', '-')
        parser.error(f'{option} requires --methods; a study file says this itself')
    return args


def read_study(args: argparse.Namespace) -> Study:
    if not Path(args.study).is_file() and '::' not in args.study:
        raise UserValueError(f'{args.study}: no such file; name a study file or a config')
    if args.methods is None:
        return load_study(args.study)
    seeds = args.seeds
    if seeds and len(seeds) == 1:
        if seeds[0] < 1:
            raise UserValueError(
                f'--seeds {seeds[0]} trains nothing; give the number of seeds, 3 for instance'
            )
        seeds = list(range(seeds[0]))
    asked = OneConfig(
        args.study,
        args.methods,
        seeds,
        args.metric,
        args.lrs,
        expansion_of(args),
        args.cfg_options or {},
        args.jobs or 1,
        args.name,
    )
    return study_of(asked)


def print_best(study: Study) -> None:
    found = best_checkpoint(study)
    if found is None:
        return
    run, path = found
    result = load_result(study, run)
    val, test = (score(study, result, split) for split in ('val', 'test'))
    print(f'Best compact checkpoint: {path}\n  {run}: {study.metric} {val:g} (val), {test} (test)')


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    if missing_for_page():
        print(f'study: study.html will not be written: {missing_for_page()}', file=sys.stderr)
    study = read_study(args)
    out_dir = Path(args.out_dir or study.work_dir)
    check_writable(out_dir, '--out-dir')
    if not args.report_only:
        # As Ctrl-C: the runs' processes are ended with this one.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            run_study(study, args.arms, None if args.methods else args.seeds, args.minutes)
        finally:
            # A pool of processes forked under such a handler may never end at its terminate().
            signal.signal(signal.SIGTERM, before)
    print(write_report(study, out_dir))
    names = ('study.md', 'study.json', 'curves.png', 'differences.png', 'study.html')
    print(f'wrote to {out_dir}: {", ".join(n for n in names if (out_dir / n).is_file())}')
    if args.methods:
        print_best(study)


if __name__ == '__main__':
    main()
