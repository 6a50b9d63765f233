"""Evaluate a compact checkpoint with stock OpenMMLab: the config, the file, and nothing else.

With --without mmexpand this process cannot import mmexpand, as on a machine that has none.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path


class Missing(MetaPathFinder):
    """Finder that makes a package impossible to import."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> None:
        """Refuse the package and everything in it; leave the rest to the other finders."""
        if name.split('.')[0] == self.package:
            raise ModuleNotFoundError(f'No module named {name!r} (blocked)', name=name)


def block(package: str) -> None:
    """Make a package impossible to import, and check it."""
    sys.meta_path.insert(0, Missing(package))
    try:
        __import__(package)
    except ModuleNotFoundError:
        print(f'{package} cannot be imported in this process')
    else:
        raise RuntimeError(f'{package} was imported already')


def evaluate(config: str, checkpoint: str, work_dir: str) -> dict[str, float]:
    """Load strictly and run the test loop."""
    from mmengine.config import Config
    from mmengine.runner import Runner, load_checkpoint

    cfg = Config.fromfile(config)
    cfg.work_dir = work_dir
    runner = Runner.from_cfg(cfg)
    load_checkpoint(runner.model, checkpoint, map_location='cpu', strict=True)
    return runner.test()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='compact config file')
    parser.add_argument('checkpoint', help='compact checkpoint file')
    parser.add_argument('--work-dir', required=True, help='the dir to save logs')
    parser.add_argument('--out', required=True, help='JSON file for the metrics')
    parser.add_argument('--without', metavar='PACKAGE', help='package that cannot be imported')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.without:
        block(args.without)
    metrics = evaluate(args.config, args.checkpoint, args.work_dir)
    if args.without in sys.modules:
        raise RuntimeError(f'{args.without} was imported nevertheless')
    out = Path(args.out)
    temporary = out.with_name(f'.{os.getpid()}.{out.name}')
    temporary.write_text(json.dumps({key: float(value) for key, value in metrics.items()}))
    os.replace(temporary, out)


if __name__ == '__main__':
    main()
