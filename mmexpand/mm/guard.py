"""The guard of every run's checkpoints: converted or refused when loaded, marked when saved."""

from typing import Any

import numpy as np
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from ..surgery import contract_, is_expanded
from ..surgery.checkpoint import (
    META_KEY,
    contract_state_dict,
    get_state_dict,
    is_expanded_state_dict,
)
from .checkpoints import (
    describe_units,
    is_training,
    match_checkpoint,
    nonlinear_layers,
    put_in_front,
    unwrap,
)
from .compat import resumes
from .resume import resume_from_whole
from .warm_start import CompactOptimizer


def guard_checkpoints(runner: Runner) -> 'LoadGuardHook':
    """Guard the checkpoints of a Runner; does nothing where they are guarded already.

    A Runner that resumes by itself will resume from a checkpoint that is whole. To be called on
    all ranks, before the Runner loads.

    Returns:
        The hook that loads.

    Raises:
        CheckpointError: if there is no whole checkpoint to resume.
    """
    for hook in runner.hooks:
        if isinstance(hook, LoadGuardHook):
            return hook
    guard = LoadGuardHook()
    # Makes a new list: mmengine may be iterating over the present one.
    put_in_front(runner, guard)
    runner.register_hook(SaveGuardHook())
    resume_from_whole(runner)
    return guard


class LoadGuardHook(Hook):
    """Converts or refuses a checkpoint of the wrong kind, before any hook or model has loaded it.

    Attributes:
        warm_start: whether a compact training may be resumed expanded; see ``ExpandHook``.
    """

    # Before EMAHook, which loads its copy of the model.
    priority = 'HIGHEST'

    def __init__(self):
        self.warm_start = False
        self._compact_optimizer: CompactOptimizer | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Bring model and checkpoint to the same kind before the weights are loaded.

        Raises:
            CheckpointError: if that is impossible; the message says what to do.
        """
        model, training = unwrap(runner.model), is_training(runner)
        resume = resumes(runner) and training
        compact = not is_expanded_state_dict(get_state_dict(checkpoint))
        if self.warm_start and resume and compact and is_expanded(model):
            self._compact_optimizer = CompactOptimizer(model, checkpoint)
            return
        expanded = is_expanded(model)
        match_checkpoint(model, checkpoint, training, resume)
        if expanded and not is_expanded(model):
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    contract_(hook.ema_model)

    def carry_over(self, runner: Runner) -> None:
        """Give the optimizer what a compact training has left, where one is resumed."""
        if self._compact_optimizer is not None:
            self._compact_optimizer.carry_over(runner)
            self._compact_optimizer = None


class SaveGuardHook(Hook):
    """Marks checkpoints as expanded or compact, and adds the folded weights to expanded ones."""

    # After EMAHook, which swaps the weights.
    priority = 'LOWEST'

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Say in ``meta`` what the checkpoint is, and give an expanded one the folded weights.

        What loads it without knowing of factors (``init_detector``, an inferencer, another
        project's ``init_cfg``) then loads the compact network, and not nothing. With ReLU between
        factors there is none.

        Arrays of text (class names) become lists: ``weights_only=True`` would refuse them.
        """
        layers = describe_units(unwrap(runner.model))
        kind = 'expanded' if layers else 'compact'
        checkpoint['meta'][META_KEY] = dict(kind=kind, layers=layers)
        if layers and not nonlinear_layers(checkpoint):
            checkpoint['state_dict'].update(contract_state_dict(checkpoint['state_dict']))
        for holder in (
            checkpoint['meta'],
            checkpoint.get('message_hub', {}).get('runtime_info', {}),
        ):
            if 'dataset_meta' in holder:
                holder['dataset_meta'] = _as_lists(holder['dataset_meta'])


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_as_lists(item) for item in value)
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
