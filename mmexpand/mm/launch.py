"""From a config and a command line to a Runner: what the tools share."""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..surgery.checkpoint import load_checkpoint
from .checkpoints import CheckpointGuardHook
from .contraction import check_writable
from .datasets import check_datasets
from .runtime import prepare_cpu


def add_common_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that OpenMMLab's train.py and test.py share."""
    parser.add_argument('--work-dir', help='the dir to save logs and models')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override some settings in the used config, the key-value pair in xxx=yyy format '
        'will be merged into config file, e.g. key="[(a,b),(c,d)]"',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def load_config(args: Namespace) -> Config:
    """Read the config and apply the common arguments.

    The work dir is, in this order: ``--work-dir``, the config's, ``work_dirs/CONFIG_NAME``.

    Raises:
        FileNotFoundError: if there is no such config.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    return cfg


def build_runner(cfg: Config, splits: tuple[str, ...]) -> Runner:
    """Build the Runner of a config, once everything that can be checked is.

    Args:
        cfg: changed in place where there is no GPU (see ``prepare_cpu``).
        splits: which of 'train', 'val' and 'test' will run: their data sets must exist.

    Raises:
        PermissionError: if the work dir cannot be written to.
        FileNotFoundError: if a data set is missing.
        CheckpointError: if the checkpoint that it names cannot be read.
    """
    check_writable(cfg.work_dir)
    check_datasets(cfg, splits)
    if cfg.get('load_from') and '://' not in cfg.load_from:
        load_checkpoint(cfg.load_from)
    prepare_cpu(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    # Also for configs without a hook of ours: a checkpoint is never half loaded.
    runner.register_hook(CheckpointGuardHook(), priority='LOWEST')
    return runner
