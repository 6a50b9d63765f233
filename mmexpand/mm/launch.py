"""From a config and a command line to a Runner: what the tools share."""

import gc
import os
import re
import traceback
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.dataset import BaseDataset
from mmengine.dist import is_distributed
from mmengine.hub import get_config
from mmengine.registry import OPTIMIZERS, RUNNERS, Registry
from mmengine.runner import Runner, find_latest_checkpoint

from ..core.names import near_matches
from ..surgery import VerificationError
from ..surgery.checkpoint import WEIGHTS_ONLY, describe_blocked, load_checkpoint, load_file
from .checkpoints import CheckpointGuardHook
from .compact_config import dicts, type_name
from .contraction import check_writable
from .datasets import DataError, check_datasets, guard_data, no_samples, text_classes
from .resume import is_whole, resume_from_whole
from .runtime import prepare_cpu

PACKAGE = Path(__file__).parents[1]
NEEDED = {
    'train': ('train_dataloader', 'train_cfg', 'optim_wrapper'),
    'val': ('val_dataloader', 'val_cfg', 'val_evaluator'),
    'test': ('test_dataloader', 'test_cfg', 'test_evaluator'),
}
"""What a config must say for a split to be run."""


class ConfigError(ValueError):
    """A config that cannot be used; the message names it and what is wrong."""


class ConfigOptions(DictAction):
    """``--cfg-options``, with words for what is no KEY=VALUE."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Sequence[str], *args: Any
    ) -> None:
        """Parse the pairs."""
        try:
            super().__call__(parser, namespace, values, *args)
        except (ValueError, AssertionError, RecursionError):  # It knows no dict(...).
            parser.error(
                '--cfg-options takes KEY=VALUE pairs, such as train_cfg.max_iters=100, got '
                + ' '.join(values)
            )


def count(text: str) -> int:
    """An argument that is a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f'a whole number of at least 1 is wanted, got {text!r}')
    return int(text)


def device(text: str) -> str:
    """An argument that is a device torch can use."""
    try:
        kind = torch.device(text).type
    except RuntimeError:
        raise ArgumentTypeError(f'cpu, cuda or cuda:N is wanted, got {text!r}') from None
    if kind == 'cuda' and not torch.cuda.is_available():
        raise ArgumentTypeError('there is no GPU that torch can use; leave it out')
    return text


def add_config_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of everything that reads a config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        help='override some settings in the used config, the key-value pair in xxx=yyy format '
        'will be merged into config file, e.g. key="[(a,b),(c,d)]"',
    )
    add_debug_argument(parser)


def add_debug_argument(parser: ArgumentParser) -> None:
    """Add ``--debug``, which every tool has; see ``tool``."""
    parser.add_argument('--debug', action='store_true', help='show the traceback of any error')


def add_common_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that OpenMMLab's train.py and test.py share."""
    parser.add_argument('--work-dir', help='the dir to save logs and models')
    add_config_arguments(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def read_config(args: Namespace, *needed: str) -> Config:
    """Read the config of a command line and apply ``--cfg-options``.

    Args:
        args: with ``config`` and ``cfg_options``; see ``open_config``.
        *needed: keys that it must have.

    Raises:
        ConfigError: if the file is missing or wrong, or lacks one of the keys.
    """
    cfg = open_config(args.config, args.cfg_options, option='--cfg-options')
    check_keys(cfg, *needed)
    return cfg


def open_config(
    config: str | os.PathLike, cfg_options: dict | None = None, option: str = 'cfg_options'
) -> Config:
    """Read a config and override what is named.

    Args:
        config: a path, or a name like ``mmdet::yolox/yolox_tiny_8xb8-300e_coco.py``.
        cfg_options: what is overridden, by dotted key.
        option: what the user knows them as.

    Raises:
        ConfigError: if the file is missing or wrong, or the overrides do not fit it.
    """
    config = os.fspath(config)
    if not is_packaged(config) and not os.path.isfile(config):
        raise ConfigError(f'{config}: no such config file')
    try:
        cfg = get_config(config) if is_packaged(config) else Config.fromfile(config)
        _drop_scope(cfg)
    except Exception as error:  # A config is Python: it can raise anything.
        raise ConfigError(f'{config} cannot be read: {_foreign(error)}') from error
    try:
        cfg.merge_from_dict(cfg_options or {})
    except Exception as error:  # mmengine asserts, and looks up keys and indexes.
        raise ConfigError(f'{option} does not fit {config}: {_foreign(error)}') from error
    hooks = (cfg_options or {}).get('custom_hooks', ())
    if any(isinstance(hook, str) for hook in hooks):
        raise ConfigError(
            f'{option}: custom_hooks is a list of text, not of hooks, which cannot be written '
            'there; name the keys of one instead: default_hooks.expand.type=ExpandHook '
            'default_hooks.expand.include=backbone default_hooks.contract.type=ContractHook'
        )
    return cfg


def is_packaged(config: str) -> bool:
    """Whether a config is named as one that a package carries: ``mmdet::...``."""
    return '::' in config


def _drop_scope(cfg: Config) -> None:
    # Where `mmexpand::...` is a _base_, mmengine takes its types for mmexpand's; they are those of
    # the default scope.
    for node in dicts(cfg._cfg_dict):
        if node.get('_scope_') == 'mmexpand':
            del node['_scope_']


def check_keys(cfg: Config, *needed: str) -> None:
    """Refuse a config that lacks something.

    Raises:
        ConfigError: naming what it lacks.
    """
    missing = [key for key in needed if cfg.get(key) is None]
    if missing:
        raise ConfigError(
            f'{cfg.filename or "the config"} lacks {", ".join(missing)}; is it a complete config, '
            'or one of those that others take as _base_?'
        )


def load_config(args: Namespace) -> Config:
    """Read the config and apply the common arguments.

    The work dir is, in this order: ``--work-dir``, the config's, ``work_dirs/CONFIG_NAME``.

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


@contextmanager
def temporary_work_dir(cfg: Config) -> Iterator[None]:
    """Give a config a work dir that is gone afterwards, and with it all that a Runner writes."""
    with TemporaryDirectory() as cfg.work_dir:
        if isinstance(cfg.get('visualizer'), dict):
            # Runners of a process share a visualizer by its name; a later one would write here.
            cfg.visualizer.name = cfg.work_dir
        yield


def build_runner(cfg: Config, splits: tuple[str, ...]) -> Runner:
    """Build the Runner of a config, once everything that can be checked is.

    Args:
        cfg: changed in place where there is no GPU (see ``prepare_cpu``).
        splits: which of 'train', 'val' and 'test' will run: their data sets must exist.

    Raises:
        ConfigError: if the config lacks what these need.
        PermissionError: if the work dir cannot be written to.
        FileNotFoundError: if a data set is missing.
        CheckpointError: if a checkpoint that it names cannot be read, or holds more than weights.
    """
    check_keys(cfg, *(key for split in splits for key in NEEDED[split]))
    check_writable(cfg.work_dir)
    check_datasets(cfg, splits)
    _check_checkpoints(cfg, training='train' in splits)
    if 'train' in splits:
        _check_optimizer(cfg)
    prepare_cpu(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    # Also for configs without a hook of ours: a checkpoint is never half loaded, or half resumed.
    runner.register_hook(CheckpointGuardHook(), priority='LOWEST')
    resume_from_whole(runner)  # FlexibleRunner loads before its hooks are asked.
    guard_data(runner)
    return runner


def training_splits(cfg: Config) -> tuple[str, ...]:
    """The splits that a training needs: validation is optional."""
    return ('train', 'val') if cfg.get('val_cfg') else ('train',)


def _check_checkpoints(cfg: Config, training: bool) -> None:
    path = cfg.get('load_from')
    if path is None and cfg.get('resume'):
        # One that is not whole is passed over; see resume.py.
        latest = find_latest_checkpoint(cfg.work_dir)
        path = latest if latest and is_whole(latest) else None
    if path and '://' not in path:
        load_checkpoint(path)
    for node in dicts(cfg.model) if training else ():
        path = node.get('checkpoint')
        if type_name(node) == 'Pretrained' and isinstance(path, str) and '://' not in path:
            load_file(path)


def _check_optimizer(cfg: Config) -> None:
    # mmengine asks for the signature of what it finds, and finds None.
    kind = (cfg.optim_wrapper.get('optimizer') or {}).get('type')
    if isinstance(kind, str):
        with OPTIMIZERS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
            if registry.get(kind) is None:
                raise ConfigError(
                    f'optim_wrapper.optimizer.type={kind!r} is no optimizer; there are '
                    + ', '.join(sorted(OPTIMIZERS.module_dict))
                )


def tool(parse_args: Callable[[], Namespace]) -> Callable[[Callable], Callable[[], None]]:
    """Decorate a tool's ``main(args)``: what its user can mend is told in a sentence.

    Config, data, checkpoints and arguments are the user's; ``--debug`` shows where it went wrong.
    Any other error keeps its traceback. No checkpoint that is loaded meanwhile can run code,
    whoever loads it.

    Args:
        parse_args: gives the arguments, ``debug`` among them.
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
                folder = Path(main.__code__.co_filename).parent
                words = None if args.debug else explain(error, (PACKAGE, folder))
                if words is None:
                    raise
                raise SystemExit(f'{Path(main.__code__.co_filename).name}: {words}') from None

        return run

    return decorate


def _leave_process_group() -> None:
    # Left to the interpreter's end, a thread of gloo that still frees a tensor aborts the process
    # (pytorch/pytorch#179291); a DDP that outlives the group does as well.
    if is_distributed():
        gc.collect()
        torch.distributed.destroy_process_group()


@contextmanager
def suits_shape(shape: Sequence[int]) -> Iterator[None]:
    """Run a network on images of a size that the user has named.

    Raises:
        ValueError: where the network fails, which most often is the size's doing.
    """
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, VerificationError):
            raise
        height, width = shape
        raise ValueError(
            f'the network cannot be run on images of {height}x{width}: {_foreign(error)}; name '
            'another size with --shape'
        ) from error


@contextmanager
def _weights_only() -> Iterator[None]:
    # OneDL's mmengine asks torch for all that is in a file. This holds for it too, and for
    # workers.
    kept = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = '1'
    os.environ.pop('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None)
    try:
        yield
    finally:
        if kept is None:
            del os.environ[WEIGHTS_ONLY]
        else:
            os.environ[WEIGHTS_ONLY] = kept


def explain(error: Exception, folders: tuple[Path, ...]) -> str | None:
    """A sentence for an error that a user can mend; None for any other.

    Those are errors raised on purpose by our code, by the system about a file, by torch about a
    checkpoint, and whatever goes wrong while an object of the config is built; and labels that
    the network has no class for.

    Args:
        error: as it was caught.
        folders: where our code is.
    """
    if isinstance(error, DataError):
        return _words(error)
    if _raised_on_purpose(error, folders):
        return _words(error)
    if isinstance(error, UnpicklingError):
        return f'a checkpoint that the config names {describe_blocked(error) or _words(error)}'
    built = _being_built(error.__traceback__)
    if built is not None:
        return _explain_building(error, *built)
    label = re.fullmatch(r'Target (-?\d+) is out of bounds\.', str(error))
    if label:
        return (
            f'the annotations have a label {label[1]}, and the network has no such class: set '
            'num_classes, or give what is to be ignored the ignore_index of the loss'
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f'{error.filename}: {error.strerror}'
    return None


def _raised_on_purpose(error: Exception, folders: tuple[Path, ...]) -> bool:
    """Whether our code has a ``raise`` of its own where this comes from."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = any(folder in Path(last.filename).parents for folder in folders)
    return ours and last.line.startswith('raise ') and not isinstance(error, AssertionError)


def _being_built(entry: TracebackType | None) -> tuple[Any, dict, Registry] | None:
    """What mmengine was building from which arguments and registry; if nested, the innermost."""
    found = None
    for frame, _ in traceback.walk_tb(entry):
        if frame.f_code.co_name == 'build_from_cfg':
            seen = frame.f_locals
            kind = seen.get('obj_cls') or seen.get('obj_type')
            found = kind, dict(seen.get('args') or {}), seen.get('registry')
    return found


def _explain_building(error: Exception, kind: Any, arguments: dict, registry: Registry) -> str:
    name = getattr(kind, '__name__', kind)
    if isinstance(error, KeyError) and isinstance(kind, str):
        known = [*registry.module_dict, *(registry.parent.module_dict if registry.parent else ())]
        words = f'there is no {kind} in the registry {registry.name!r} or its parent'
        near = near_matches(kind, known, otherwise='')
        return f'{words}; {near}; is its module among custom_imports?'
    if not (isinstance(kind, type) and issubclass(kind, BaseDataset)):
        return f'{name} cannot be built as the config says: {_foreign(error)}'
    if words := text_classes(arguments):
        return f'{name} cannot be built: {words}'
    if 'need at least one array' in str(error):  # mmengine joins the samples that there are.
        return no_samples(name, arguments.get('ann_file'), arguments.get('data_prefix'))
    path = _file_in_hand(error) or arguments.get('ann_file') or arguments.get('data_root', '')
    return f'{name} cannot read {path}: {_foreign(error)}; mend the file, or leave it out'


def _file_in_hand(error: Exception) -> str | None:
    """The file that was being read when a data set could not be built."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    while frames and frames[-1].f_code.co_name != 'build_from_cfg':
        held = [value for value in frames.pop().f_locals.values() if isinstance(value, str)]
        files = [value for value in held if os.path.isfile(value)]
        if files:
            return files[-1]
    return None


def _foreign(error: Exception) -> str:
    words = _words(error)
    return words if isinstance(error, OSError) else f'{words} ({type(error).__name__})'


def _words(error: Exception) -> str:
    """An error's message in one paragraph; of one from a loader's process its last line."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if text.startswith('Caught '):
        text = re.sub(r'^\S+: ', '', text.strip().splitlines()[-1])
    return ' '.join(text.split())
