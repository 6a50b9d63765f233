"""The weight sets of a training: last, best and averaged."""

import logging
import os
from collections.abc import Callable, Iterator

from mmengine.fileio import exists, get_local_path, join_path
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.runner import Runner
from torch import nn

from ..surgery.checkpoint import get_state_dict, is_expanded_state_dict
from ..surgery.copying import copy_model
from ..surgery.fake_quantisation import INT8_KEY
from ..surgery.weights import load_own
from .checkpoints import match_checkpoint, unwrap
from .logs import log
from .quant import QuantHook
from .ranks import on_main, together

WeightSet = tuple[str, Callable[[], tuple[nn.Module, dict] | None]]
"""A name and a function that returns a model with these weights and the ``meta`` of trained int8
ranges, or None if they are lost."""


def weight_sets(runner: Runner) -> Iterator[WeightSet]:
    """Yield the weight sets to contract after training: last, best and averaged."""
    model, meta = unwrap(runner.model), {}
    for hook in runner.hooks:
        if isinstance(hook, QuantHook):
            meta = hook.meta()
    yield 'last', lambda: (model, meta)
    best = [h for h in runner.hooks if isinstance(h, CheckpointHook) and h.save_best]
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            yield 'ema', lambda hook=hook: (hook.ema_model.module, meta)
        elif hook in best:
            for name, path in _best_checkpoints(hook, single=len(best) == 1):
                yield name, lambda hook=hook, path=path: _load_best(model, hook, path)


def _best_checkpoints(hook: CheckpointHook, single: bool) -> list[tuple[str, str]]:
    if len(hook.key_indicators) > 1:
        found = hook.best_ckpt_path_dict
    elif single:
        return [('best', hook.best_ckpt_path)] if hook.best_ckpt_path else []
    else:
        found = {hook.key_indicators[0]: hook.best_ckpt_path}
    return [(f'best_{key.replace("/", "_")}', path) for key, path in found.items() if path]


def _load_best(model: nn.Module, hook: CheckpointHook, path: str) -> tuple[nn.Module, dict] | None:
    # Only the main process reads: the others may have no access to its disk.
    found = on_main(lambda: _read_best(hook, path))
    if found is None:
        return None
    weights, meta = found
    with together():
        model = copy_model(model)
        # After a warm start the best weights may be those of the earlier compact training.
        purpose = 'resume' if is_expanded_state_dict(weights) else 'start'
        match_checkpoint(model, dict(state_dict=weights), purpose)
        model.load_state_dict(weights)
    return model, meta


def _read_best(hook: CheckpointHook, path: str) -> tuple[dict, dict] | None:
    # A resumed run has the path from before its work dir was moved.
    moved = join_path(hook.out_dir, os.path.basename(path), backend_args=hook.backend_args)
    for place in (path, moved):
        if exists(place, backend_args=hook.backend_args):
            with get_local_path(place, backend_args=hook.backend_args) as local:
                checkpoint = load_own(local)
                meta = checkpoint.get('meta', {})
                ranges = {INT8_KEY: meta[INT8_KEY]} if INT8_KEY in meta else {}
                return get_state_dict(checkpoint), ranges
    log(
        f'ContractHook: the best checkpoint is neither at {path} nor at {moved}: the best weights '
        'are not contracted',
        logging.WARNING,
    )
    return None
