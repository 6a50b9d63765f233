"""Expand and contract a network of every family of mmdet's and mmseg's configs; write the page.

Each family runs in a separate process and gives one JSON; existing ones are not run again.
"""

import argparse
import json
import re
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
import zoo_network
from rich.progress import track
from zoo_page import page

from mmexpand.errors import UserValueError
from mmexpand.files import write_text
from mmexpand.mm.command_line import add_debug_argument, count, tool
from mmexpand.mm.contraction import check_writable


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, Path('resources/zoo'), Path('docs/supported_networks.md'))
    return parser.parse_args()


def add_arguments(parser: argparse.ArgumentParser, out_dir: Path, page: Path) -> None:
    """Add the arguments of a tool that runs families one by one."""
    parser.add_argument(
        '--families', nargs='+', help='families to run, such as mmdet/atss; default: all'
    )
    parser.add_argument('--out-dir', type=Path, default=out_dir, help='folder of the JSON files')
    parser.add_argument('--page', type=Path, default=page, help='the page to write')
    parser.add_argument(
        '--page-only', action='store_true', help='write the page from the existing results'
    )
    parser.add_argument(
        '--limit', type=count, default=600, help='time limit of a family in seconds'
    )
    add_debug_argument(parser)


def run_family(
    family: str, path: Path, limit: int, work: Callable[[str, Path], None] | None = None
) -> None:
    """Run a family in a process that writes its JSON; if it is killed, write the reason."""
    start = time.perf_counter()
    # Forked after imports, which take longer than many networks.
    process = get_context('fork').Process(
        target=work or zoo_network.main, args=(family, path.absolute())
    )
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        end = f'took more than {limit} s'
    elif process.exitcode < 0:
        end = f'ended by {signal.Signals(-process.exitcode).name}'
    else:
        end = f'exit status {process.exitcode}'
    if not path.exists():
        log = zoo_network.log_of(path)
        stage = re.findall(r'^stage: (.*)$', log.read_text(errors='replace'), re.MULTILINE)[-1]
        status = 'stock' if stage == zoo_network.BUILDING else 'failed'
        seconds = round(time.perf_counter() - start, 1)
        words = f'{end} (stage: {stage})'
        result = dict(family=family, status=status, error=words, seconds=seconds)
        write_text(json.dumps(result, indent=2), path)


def run_families(
    args: argparse.Namespace,
    work: Callable[[str, Path], None],
    page: Callable[[list[dict], list[str]], str],
) -> None:
    """Run the missing families, and write the page of all results."""
    known = zoo_network.families()
    chosen = args.families or known
    unknown = [family for family in chosen if family not in known]
    if unknown:
        raise UserValueError(f'unknown family {unknown[0]}; the families are {", ".join(known)}')
    check_writable(args.out_dir, '--out-dir')
    paths = {family: args.out_dir / f'{family.replace("/", "_")}.json' for family in known}
    torch.set_num_threads(1)  # More processes would wait for each other.
    if not args.page_only:
        for family in track(chosen, description='families'):
            if not paths[family].exists():
                run_family(family, paths[family], args.limit, work)
    done = [json.loads(path.read_text()) for path in paths.values() if path.exists()]
    missing = [family for family, path in paths.items() if not path.exists()]
    write_text(page(done, missing), args.page)


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    run_families(args, zoo_network.main, page)


if __name__ == '__main__':
    main()
