"""Dry run of a whole training: one iteration and the steps after training, on one batch."""

import copy
from dataclasses import dataclass

import torch
from mmengine.config import Config
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..analysis.footprint import resident_peak
from .compact_config import hook_configs, type_name
from .hooks import ContractHook
from .launch import build_runner, temporary_work_dir, training_splits
from .start import StartHook


@HOOKS.register_module()
class DryRunOnlyHook(ContractHook):
    """A ContractHook that does its dry run only, and nothing after training."""

    def after_train(self, runner: Runner) -> None:
        """Skip contraction."""


@dataclass(frozen=True)
class DryRun:
    """Loss and peak memory of one iteration.

    Attributes:
        loss: the training loss.
        start: words on the start of the expanded layers; see ``StartHook``.
        memory: peak memory in bytes, of the GPU or, without a GPU, of this process; None if the
            system does not report it.
    """

    loss: float
    start: str | None
    memory: int | None


def dry_run_training(cfg: Config) -> DryRun:
    """Train one iteration of a config and do a dry run of the contraction; no file is kept.

    Args:
        cfg: the config, which is not changed.

    Raises:
        DryRunError: if the contraction would fail. Errors of training are raised as they are.
    """
    cfg = copy.deepcopy(cfg)
    hooks = list(cfg.get('custom_hooks') or ())
    # The hook would measure gradients before and after the iteration, which takes long.
    hooks = [hook for hook in hooks if type_name(hook) != 'GradientConfusionHook']
    cfg.custom_hooks = hooks
    contracting = [hook for hook in hook_configs(cfg) if type_name(hook) == 'ContractHook']
    for hook in contracting:
        hook.type = 'DryRunOnlyHook'
    if not contracting:
        hooks.append(dict(type='DryRunOnlyHook'))
    for hook in hook_configs(cfg):
        if type_name(hook) == 'EMAHook':
            hook.update(begin_iter=0, begin_epoch=0)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=1, val_interval=2)
    cfg.param_scheduler = None
    cfg.resume = False
    cfg.log_level = 'WARNING'
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with temporary_work_dir(cfg):
        runner = build_runner(cfg, training_splits(cfg))
        runner.train()
        loss = runner.message_hub.get_scalar('train/loss').current()
        starts = [hook.words for hook in runner.hooks if isinstance(hook, StartHook)]
    return DryRun(float(loss), next(iter(starts), None), _peak_memory())


def _peak_memory() -> int | None:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        return resident_peak()
    except ModuleNotFoundError:
        return None
