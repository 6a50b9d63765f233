"""Expand and contract a network of every family of mmdet's and mmseg's configs; write the page.

Each in a process of its own, one JSON a family: what is there is not run again.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.progress import track
from zoo_network import families
from zoo_page import page

from mmexpand.files import written_whole
from mmexpand.mm.contraction import check_writable
from mmexpand.mm.launch import add_debug_argument, count, tool

NETWORK = Path(__file__).with_name('zoo_network.py')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--families', nargs='+', help='such as mmdet/atss; all without it')
    parser.add_argument(
        '--out-dir', type=Path, default=Path('work_dirs/zoo'), help='where the JSON files are'
    )
    parser.add_argument('--page', type=Path, help='write a Markdown page here')
    parser.add_argument('--limit', type=count, default=600, help='seconds that each may take')
    add_debug_argument(parser)
    return parser.parse_args()


def run_family(family: str, path: Path, limit: int) -> None:
    """Let a process write the JSON of a family; where it cannot, say how it ended."""
    start = time.perf_counter()
    command = [sys.executable, str(NETWORK), family, str(path.absolute())]
    env = dict(os.environ, OMP_NUM_THREADS='1')  # More threads wait for each other on busy cores.
    log = path.with_suffix('.log')
    with log.open('w') as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        try:
            code = process.wait(limit)
            end = f'ended by {signal.Signals(-code).name}' if code < 0 else f'exit status {code}'
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            end = f'took more than {limit} s'
    if not path.exists():
        stage = (re.findall(r'^stage: (.*)$', log.read_text(), re.MULTILINE) or ['start'])[-1]
        seconds = round(time.perf_counter() - start, 1)
        status = 'stock' if stage in ('start', 'building stock') else 'failed'
        result = dict(
            family=family, status=status, error=f'{end} (after: {stage})', seconds=seconds
        )
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(result, indent=2))


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    known = families()
    chosen = args.families or known
    unknown = [family for family in chosen if family not in known]
    if unknown:
        raise ValueError(f'there is no family {unknown[0]}; there are {", ".join(known)}')
    check_writable(args.out_dir, '--out-dir')
    paths = {family: args.out_dir / f'{family.replace("/", "_")}.json' for family in chosen}
    for family, path in track(paths.items(), description='families'):
        if not path.exists():
            run_family(family, path, args.limit)
    text = page([json.loads(path.read_text()) for path in paths.values()])
    if args.page:
        with written_whole(args.page) as temporary:
            temporary.write_text(text)
    else:
        print(text)


if __name__ == '__main__':
    main()
