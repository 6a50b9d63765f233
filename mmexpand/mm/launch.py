"""Building a Runner from a config after all checks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
"""Required keys of a config, by the split to be run."""


@contextmanager
def temporary_work_dir(cfg: Config) -> Iterator[None]:
    """Give a config a temporary work dir, which is removed after this context with its files."""
    with TemporaryDirectory() as cfg.work_dir:
        # Visualizers are shared by their name, or else the experiment's: a later Runner would write
        # into this folder.
        cfg.experiment_name = Path(cfg.work_dir).name
        if isinstance(cfg.get('visualizer'), dict):
            cfg.visualizer.name = cfg.work_dir
            cfg.visualizer.vis_backends = None  # No run in an online tracker.
        yield


def build_runner(cfg: Config, splits: tuple[str, ...]) -> Runner:
    """Check a config and build its Runner.

    Args:
        cfg: changed in place if there is no GPU (see ``prepare_cpu``).
        splits: the splits to run, of 'train', 'val' and 'test'; their data must exist.

    Raises:
        ConfigError: if the config lacks keys that the splits require.
        PermissionError: if the work dir cannot be written to.
        FileNotFoundError: if data is missing.
        CheckpointError: if a checkpoint of the config cannot be read, or holds more than weights.
    """
    check_keys(cfg, *(key for split in splits for key in NEEDED[split]))
    check_writable(cfg.work_dir)
    check_datasets(cfg, splits)
    _check_checkpoints(cfg, training='train' in splits)
    if 'train' in splits:
        _check_optimizer(cfg)
    prepare_cpu(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    # Hooks of mmexpand guard too, but a config may have none, and FlexibleRunner loads before them.
    guard_checkpoints(runner)
    guard_data(runner)
    return runner


def training_splits(cfg: Config) -> tuple[str, ...]:
    """Return the splits that a training requires; validation is optional."""
    return ('train', 'val') if cfg.get('val_cfg') else ('train',)


def _check_checkpoints(cfg: Config, training: bool) -> None:
    path = cfg.get('load_from')
    if path is None and cfg.get('resume'):
        # resume.py skips a truncated checkpoint.
        latest = find_latest_checkpoint(cfg.work_dir)
        path = latest if latest and is_whole(latest) else None
    if path and '://' not in path and not Path(path).is_dir():  # DeepSpeed writes folders.
        load_checkpoint(path)
    for node in dicts(cfg.model) if training else ():
        path = node.get('checkpoint')
        if type_name(node) == 'Pretrained' and isinstance(path, str) and '://' not in path:
            load_file(path)


def _check_optimizer(cfg: Config) -> None:
    # For an unknown type, mmengine would fail with the signature of None.
    kind = (cfg.optim_wrapper.get('optimizer') or {}).get('type')
    if isinstance(kind, str):
        with OPTIMIZERS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
            if registry.get(kind) is None:
                raise ConfigError(
                    f'optim_wrapper.optimizer.type={kind!r} is not a registered optimizer; use one '
                    f'of {", ".join(sorted(OPTIMIZERS.module_dict))}'
                )
