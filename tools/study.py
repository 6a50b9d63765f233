"""Compare configs: tune the learning rate of each, train all seeds, report differences.

python tools/study.py configs/study/camvid_unet.py
"""

import argparse
import math
import signal
import sys

from mmexpand.study import StudyError, load_study, run_study, write_report
from mmexpand.study.report import missing_for_page


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Run a study and report it')
    parser.add_argument('study', help='study file path: arms, seeds, learning rates, metric')
    parser.add_argument('--arms', nargs='+', help='arms to run (default: all)')
    parser.add_argument('--seeds', nargs='+', type=int, help='seeds to run (default: all)')
    parser.add_argument(
        '--minutes', type=float, default=math.inf, help='start no run later than this'
    )
    parser.add_argument(
        '--report-only', action='store_true', help='report the results that are there'
    )
    parser.add_argument('--out-dir', help='where the report goes (default: work_dirs/STUDY)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if missing_for_page():
        print(f'study: study.html will not be written: {missing_for_page()}', file=sys.stderr)
    try:
        study = load_study(args.study)
        if not args.report_only:
            # As Ctrl-C: the runs' processes are ended with this one.
            before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            try:
                run_study(study, args.arms, args.seeds, args.minutes)
            finally:
                # A pool of processes forked under such a handler may never end at its terminate().
                signal.signal(signal.SIGTERM, before)
    except (StudyError, FileNotFoundError) as error:
        raise SystemExit(f'study: {error}') from None
    print(write_report(study, args.out_dir or study.work_dir))


if __name__ == '__main__':
    main()
