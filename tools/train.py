"""Train a network, expanded by the hooks of its config or by the options below."""

import argparse

from mmengine.runner import find_latest_checkpoint

from mmexpand.errors import UserValueError
from mmexpand.mm.command_line import (
    add_common_arguments,
    add_expansion_arguments,
    expansion_of,
    load_config,
    tool,
)
from mmexpand.mm.config_file import check_keys
from mmexpand.mm.launch import build_runner, training_splits
from mmexpand.mm.models import set_expansion


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file path')
    add_common_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='train in automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate by the batch size'
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from this checkpoint, or without a path from the latest in the work dir',
    )
    add_expansion_arguments(parser)
    return parser.parse_args()


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    cfg = load_config(args)
    set_expansion(cfg, expansion_of(args))
    if args.amp:
        check_keys(cfg, 'optim_wrapper')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UserValueError(
                f'{args.config} has no auto_scale_lr.base_batch_size; add it, or leave out '
                '--auto-scale-lr'
            )
        cfg.auto_scale_lr.enable = True
    checkpoint = None if args.resume == 'auto' else args.resume
    # Without a checkpoint to resume, load_from of the config is loaded.
    if checkpoint or (args.resume and find_latest_checkpoint(cfg.work_dir)):
        cfg.resume, cfg.load_from = True, checkpoint
    build_runner(cfg, training_splits(cfg)).train()


if __name__ == '__main__':
    main()
