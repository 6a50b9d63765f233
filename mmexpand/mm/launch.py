"""From a config to a Runner, once everything that can be checked is."""

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from mmengine.config import Config
from mmengine.registry import OPTIMIZERS, RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint

from ..surgery.checkpoint import load_checkpoint, load_file
from .compact_config import dicts, type_name
from .config_file import ConfigError, check_keys
from .contraction import check_writable
from .datasets import check_datasets, guard_data
from .guard import guard_checkpoints
from .resume import is_whole
from .runtime import prepare_cpu

NEEDED = {
    'train': ('train_dataloader', 'train_cfg', 'optim_wrapper'),
    'val': ('val_dataloader', 'val_cfg', 'val_evaluator'),
    'test': ('test_dataloader', 'test_cfg', 'test_evaluator'),
}
"""What a config must say for a split to be run."""


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
    # Also for configs without a hook of ours; and FlexibleRunner loads before it calls a hook.
    guard_checkpoints(runner)
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
