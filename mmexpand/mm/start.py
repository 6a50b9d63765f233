"""A report, at the first training step, on the weights that an expanded training starts from."""

import copy
import logging
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner, set_random_seed
from torch import nn

from ..surgery import contract_, named_units
from ..surgery.copying import copy_model
from ..surgery.verify import full_precision, relative_errors
from .checkpoints import unwrap
from .evaluation import preprocess
from .guard import guard_checkpoints
from .logs import log
from .models import features, tensor_outputs
from .random_state import random_state_kept
from .ranks import describe

LARGE = 0.01
"""The distance in eval mode from which on the log warns, since rounding cannot cause it."""


class StartHook(Hook):
    """A hook that logs, at the first training step, what the expanded layers start from.

    If layers start from given weights, the hook compares the expanded network with the compact
    network that has these weights, on the batch of the step.

    Attributes:
        words: the logged message; None before the first step, and in a resumed training.
    """

    def __init__(self):
        self.words: str | None = None
        self._looked = False

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Log the start at the first step, and free the given weights."""
        if self._looked:
            return
        self._looked = True
        model = unwrap(runner.model)
        units = named_units(model)
        if not runner.iter or guard_checkpoints(runner).warm_start:
            self.words, level = _describe_start(model, data_batch, bool(runner.cfg.get('compile')))
            log(self.words, level)
        for unit in units.values():
            unit.given = None


def _describe_start(model: nn.Module, batch: Any, compiled: bool) -> tuple[str, int]:
    units = named_units(model)
    others = [name for name, unit in units.items() if not unit.given]
    words = f'{len(units) - len(others)} of {len(units)} expanded layers start from given weights'
    if others:
        words += f', {len(others)} from their initialisation, {others[0]} first'
    if len(others) == len(units) or compiled:
        return words, logging.INFO
    try:
        distances = distance_to_given(model, batch)
    except Exception as error:
        return f'{words}; not compared with the given network ({describe(error)})', logging.INFO
    shown = ' and '.join(f'{value:.1e} in {mode} mode' for mode, value in distances.items())
    level = logging.INFO if distances['eval'] < LARGE else logging.WARNING
    return (
        f'{words}; on the first batch outputs differ from those of the given network by at most '
        f'{shown} (relative to the largest)',
        level,
    )


def distance_to_given(model: nn.Module, batch: Any) -> dict[str, float]:
    """Compare an expanded model with the compact model that has its given weights.

    Units without given weights use their folded kernel, in both models and both modes. Copies
    run, so that the model, its norms and random states do not change.

    Args:
        model: the model, without a wrapper; its units hold their given weights.
        batch: a batch of the train loop.

    Returns:
        The largest difference of an output, relative to the largest output, in 'eval' and
        'training' mode.
    """
    given = {name: unit.given[0] for name, unit in named_units(model).items() if unit.given}
    with random_state_kept(), full_precision(), torch.no_grad():
        data = preprocess(model, batch, training=True)
        expanded, compact = copy_model(model), contract_(copy_model(model))
        for name, unit in named_units(expanded).items():
            if name not in given:
                unit.freeze_norms()
        for name, (weight, bias) in given.items():
            layer = compact.get_submodule(name)
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias)
        found = {}
        for mode in ('eval', 'training'):
            for network in (expanded, compact):
                network.train(mode == 'training')  # It may return None, as mmdet's LD.
            outputs = [_run(network, data) for network in (expanded, compact)]
            found[mode] = max(relative_errors(*outputs))
    return found


def _run(model: nn.Module, data: dict) -> Any:
    """Return a model's outputs, or its features if it has no outputs without labels."""
    # Both networks must draw the same random numbers, as for dropout.
    set_random_seed(0)
    try:
        return tensor_outputs(model, copy.deepcopy(data))
    except Exception:
        return features(model, copy.deepcopy(data))
