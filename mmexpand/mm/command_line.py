"""The command line of a tool: its arguments, its config, and its errors."""

import gc
import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmengine.config import Config, DictAction
from mmengine.dist import is_distributed

from ..core.strategies import FORWARDS
from ..surgery.checkpoint import WEIGHTS_ONLY
from .config_file import check_keys, open_config
from .error_report import explain


class ConfigOptions(DictAction):
    """``--cfg-options`` with an error message for arguments that are not KEY=VALUE."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Sequence[str], *args: Any
    ) -> None:
        """Parse the pairs."""
        try:
            super().__call__(parser, namespace, values, *args)
        except (ValueError, AssertionError, RecursionError):  # It cannot parse dict(...).
            parser.error(
                '--cfg-options takes KEY=VALUE pairs, such as train_cfg.max_iters=100, got '
                + ' '.join(values)
            )


def count(text: str) -> int:
    """Return an argument as a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f'expected a whole number of at least 1, got {text!r}')
    return int(text)


def device(text: str) -> str:
    """Return an argument that names a device of torch."""
    try:
        kind = torch.device(text).type
    except RuntimeError:
        raise ArgumentTypeError(f'expected cpu, cuda or cuda:N, got {text!r}') from None
    if kind == 'cuda' and not torch.cuda.is_available():
        raise ArgumentTypeError('torch finds no GPU; leave out --device')
    return text


def add_config_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of all tools that read a config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        help='override settings of the config by KEY=VALUE pairs, e.g. '
        'train_cfg.max_iters=100 key="[(a,b),(c,d)]"',
    )
    add_debug_argument(parser)


def add_debug_argument(parser: ArgumentParser) -> None:
    """Add ``--debug``, an argument of every tool; see ``tool``."""
    parser.add_argument('--debug', action='store_true', help='show the traceback of any error')


EXPANSION = dict(
    method=dict(help='block to expand with'),
    rate=dict(type=float, help='expansion rate'),
    include=dict(nargs='+', help='layers to expand: prefixes, globs, re:..., kernel:3x3'),
    exclude=dict(nargs='+', help='layers not to expand'),
    forward=dict(choices=FORWARDS, help='how units run (default: auto)'),
)
"""Options of ``ExpandHook`` on a command line."""


def add_expansion_arguments(parser: ArgumentParser, *names: str) -> None:
    """Add options of ``ExpandHook``, which replace those of the config.

    Args:
        parser: of a tool.
        *names: keys of ``EXPANSION``; none: all.
    """
    group = parser.add_argument_group('expansion (replaces the options of the config)')
    for name in names or EXPANSION:
        group.add_argument(f'--{name}', **EXPANSION[name])


def expansion_of(args: Namespace) -> dict[str, Any]:
    """Return the options of ``ExpandHook`` that a command line gives."""
    return {name: value for name in EXPANSION if (value := getattr(args, name, None)) is not None}


def add_common_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that OpenMMLab's train.py and test.py share."""
    parser.add_argument('--work-dir', help='folder for logs and checkpoints')
    add_config_arguments(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='launcher of distributed jobs (default: none)',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def read_config(args: Namespace, *needed: str) -> Config:
    """Read the config of a command line and apply ``--cfg-options``.

    Args:
        args: with ``config`` and ``cfg_options``; see ``open_config``.
        *needed: required keys of the config.

    Raises:
        ConfigError: if the file is missing, cannot be read or lacks a required key.
    """
    cfg = open_config(args.config, args.cfg_options, option='--cfg-options')
    check_keys(cfg, *needed)
    return cfg


def load_config(args: Namespace) -> Config:
    """Read the config and apply the common arguments.

    The work dir is the first that is given of ``--work-dir``, the config's ``work_dir`` and
    ``work_dirs/CONFIG_NAME``.

    Raises:
        ConfigError: see ``read_config``.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args, 'model')
    cfg.launcher = args.launcher
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    return cfg


def tool(parse_args: Callable[[], Namespace]) -> Callable[[Callable], Callable[[], None]]:
    """Decorate a tool's ``main(args)``: print an error that its user can fix as one message.

    ``explain`` gives the message; ``--debug`` shows the traceback. Any other error keeps its
    traceback. No checkpoint that is loaded while the tool runs can run code.

    Args:
        parse_args: returns the arguments, ``debug`` among them.
    """

    def decorate(main: Callable[[Namespace], None]) -> Callable[[], None]:
        @wraps(main)
        def run() -> None:
            args = parse_args()
            try:
                with _weights_only():
                    main(args)
                _leave_process_group()
            except Exception as error:
                words = None if args.debug else explain(error)
                if words is None:
                    raise
                raise SystemExit(f'{Path(main.__code__.co_filename).name}: {words}') from None

        return run

    return decorate


def _leave_process_group() -> None:
    # At the end of the interpreter a thread of gloo that still frees a tensor would abort the
    # process (pytorch/pytorch#179291), and so would a DDP that outlives the group.
    if is_distributed():
        gc.collect()
        torch.distributed.destroy_process_group()


@contextmanager
def _weights_only() -> Iterator[None]:
    # OneDL's mmengine loads files without weights_only. The variable covers it and workers.
    with mock.patch.dict(os.environ, {WEIGHTS_ONLY: '1'}):
        os.environ.pop('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None)
        yield
