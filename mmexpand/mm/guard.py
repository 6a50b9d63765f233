"""Hooks that convert or refuse checkpoints when they are loaded and mark them when saved."""

import numpy as np
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from ..core.compat import tree_map_only
from ..surgery import contract_, is_expanded
from ..surgery.checkpoint import (
    META_KEY,
    contract_state_dict,
    get_state_dict,
    is_expanded_state_dict,
)
from .checkpoints import (
    describe_units,
    match_checkpoint,
    nonlinear_layers,
    put_in_front,
    unwrap,
)
from .compat import is_training, load_again, resumes
from .resume import resume_from_whole
from .warm_start import CompactOptimizer


def guard_checkpoints(runner: Runner) -> 'LoadGuardHook':
    """Add both hooks to a Runner, unless it has them, and make it resume a complete checkpoint.

    Call it on all ranks, before the Runner loads.

    Returns:
        The hook that checks loaded checkpoints.

    Raises:
        CheckpointError: if the Runner resumes and no complete checkpoint exists.
    """
    for hook in runner.hooks:
        if isinstance(hook, LoadGuardHook):
            return hook
    guard = LoadGuardHook()
    put_in_front(runner, guard)
    runner.register_hook(SaveGuardHook())
    resume_from_whole(runner)
    return guard


class LoadGuardHook(Hook):
    """A hook that converts or refuses a checkpoint of the wrong kind before it is loaded.

    Attributes:
        warm_start: whether a compact training may be resumed expanded; see ``ExpandHook``.
    """

    # Before EMAHook, which loads its copy of the model.
    priority = 'HIGHEST'

    def __init__(self):
        self.warm_start = False
        self._compact_optimizer: CompactOptimizer | None = None

    def before_run(self, runner: Runner) -> None:
        """Load the checkpoint again if init_weights overwrote it after a validation."""
        if is_training(runner) and not getattr(unwrap(runner.model), 'is_init', True):
            load_again(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Convert model or checkpoint such that they fit, before the weights are loaded.

        Raises:
            CheckpointError: if they cannot fit; the message gives the fix.
        """
        model, purpose = unwrap(runner.model), 'test'
        if is_training(runner):
            purpose = 'resume' if resumes(runner) else 'start'
        compact = not is_expanded_state_dict(get_state_dict(checkpoint))
        if self.warm_start and purpose == 'resume' and compact and is_expanded(model):
            self._compact_optimizer = CompactOptimizer(model, checkpoint)
            return
        expanded = is_expanded(model)
        match_checkpoint(model, checkpoint, purpose)
        if expanded and not is_expanded(model):
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    contract_(hook.ema_model)

    def carry_over(self, runner: Runner) -> None:
        """Give the optimizer the state of a compact training that is resumed expanded."""
        if self._compact_optimizer is not None:
            self._compact_optimizer.carry_over(runner)
            self._compact_optimizer = None


class SaveGuardHook(Hook):
    """A hook that marks checkpoints as expanded or compact and adds folded weights."""

    # After EMAHook, which swaps the weights.
    priority = 'LOWEST'

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Write the checkpoint's kind into ``meta`` and add folded weights if it is expanded.

        APIs that know no factors (``init_detector``, inferencers, another project's ``init_cfg``)
        then load the compact network. With ReLU between factors there are no folded weights.

        Arrays of text (class names) become lists, since ``weights_only=True`` refuses arrays.
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
                holder['dataset_meta'] = tree_map_only(
                    (np.ndarray, np.generic), lambda array: array.tolist(), holder['dataset_meta']
                )
