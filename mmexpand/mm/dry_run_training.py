"""Whether a training would work: one iteration, and what is done after the last one, on a batch."""

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
from .models import set_expansion


@HOOKS.register_module()
class DryRunOnlyHook(ContractHook):
    """ContractHook's dry run, and nothing of what it does after training."""

    def after_train(self, runner: Runner) -> None:
        """Write nothing."""


@dataclass(frozen=True)
class DryRun:
    """What one iteration has shown.

    Attributes:
        loss: of it.
        memory: the most that was held, in bytes: of the GPU, or of this process without one;
            None where the system does not tell.
    """

    loss: float
    memory: int | None


def dry_run_training(cfg: Config, expand: dict | None = None) -> DryRun:
    """Train one iteration as a config says, and do a dry run of the contraction; nothing is kept.

    Args:
        cfg: it is left as it was.
        expand: arguments in the place of those that the config's ExpandHooks and builders have,
            or of an ExpandHook where it has none; None: as it says.

    Raises:
        DryRunError: if the contraction would fail; other errors are those of training.
    """
    cfg = copy.deepcopy(cfg)
    set_expansion(cfg, expand or {})
    hooks = list(cfg.get('custom_hooks') or ())
    # It would measure before the iteration, and after it.
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
    return DryRun(float(loss), _peak_memory())


def _peak_memory() -> int | None:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        return resident_peak()
    except ModuleNotFoundError:
        return None
