"""Write the report of a work dir: one HTML page that opens without a server."""

import argparse
import os
from pathlib import Path

from mmengine.config import Config

from mmexpand.mm.command_line import add_config_arguments, read_config, tool
from mmexpand.mm.config_file import ConfigError
from mmexpand.mm.contraction import CONFIG_NAME, check_writable
from mmexpand.mm.runtime import prepare_cpu
from mmexpand.report import check_report


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dir', help='work dir of a training with ContractHook')
    add_config_arguments(parser)
    return parser.parse_args()


def trained_config(args: argparse.Namespace) -> Config:
    """Return the config of the latest run in a work dir, where mmengine keeps it.

    Raises:
        ConfigError: if the work dir holds no config or no compact checkpoint.
    """
    work_dir = Path(args.work_dir)
    if not any(work_dir.glob('compact_*.pth')):
        raise ConfigError(
            f'{work_dir} holds no compact_*.pth; name the work dir of a training with '
            'ContractHook, or contract a checkpoint into it with tools/contract.py'
        )
    configs = [path for path in work_dir.glob('*.py') if path.name != CONFIG_NAME]
    if not configs:
        raise ConfigError(
            f'{work_dir} holds compact networks, but not the config of the training; copy it there'
        )
    args.config = str(max(configs, key=os.path.getmtime))
    return read_config(args)


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    check_report()
    cfg = trained_config(args)
    check_writable(args.work_dir, 'work_dir')
    cfg.launcher = 'none'
    prepare_cpu(cfg)
    from mmexpand.mm.run_report import write_run_report

    path, notes = write_run_report(args.work_dir, cfg)
    for note in notes:
        print(f'not in the report: {note}')
    print(f'wrote {path}')


if __name__ == '__main__':
    main()
