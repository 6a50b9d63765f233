"""Dry run: the steps after training, tried on one batch before the first training step."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner
from torch import nn

from ..errors import UserError
from ..surgery.copying import copy_model
from .checkpoints import unwrap
from .compact_config import make_compact_config
from .compat import has_val_loop
from .contraction import (
    Contraction,
    compact_checkpoint,
    contract_and_verify,
    has_model,
    run_meta,
)
from .evaluation import evaluate_one_batch, first_batch
from .logs import log
from .models import build_compact_model
from .random_state import random_state_kept
from .ranks import describe, together


class DryRunError(UserError, RuntimeError):
    """A step after training that would fail, found before training; the message gives the fix."""


class DryRunHook(Hook):
    """A hook that does the dry run when the train loop has read its first batch.

    By then the loop's workers are started, and inherit no file that the dry run opens.

    Attributes:
        batch: the latest batch of the train loop, if the Runner does not validate.
    """

    def __init__(self):
        self.batch: Any = None
        self._tried = False

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Do the dry run before the first step.

        Raises:
            DryRunError: if a step after training would fail.
        """
        if not has_val_loop(runner):
            self.batch = data_batch
        if not self._tried:
            self._tried = True
            dry_run(unwrap(runner.model), runner, data_batch)


def dry_run(model: nn.Module, runner: Runner, train_batch: Any) -> None:
    """Contract, verify, evaluate, build the compact config and serialise once, on all ranks.

    Random states, data loaders, the evaluator and the model stay unchanged, so that training is
    exactly the same as without a dry run.

    Args:
        model: the expanded model, without a distributed wrapper.
        runner: the Runner, about to train.
        train_batch: a batch of the train loop, for a Runner that does not validate.

    Raises:
        DryRunError: on all ranks, if a step fails.
    """
    with random_state_kept():
        with _refused('read one batch', "check the config's data loader"):
            batch, training = first_batch(runner, train_batch)
        with _refused(
            'copy the model', 'remove attributes that cannot be copied (locks, files, streams)'
        ):
            expanded = copy_model(model)
        with _refused('contract', 'skip the named layers with exclude=[...] of ExpandHook'):
            result = contract_and_verify(expanded, batch, training)
        with _refused('evaluate one batch', "check the val loop's data and evaluator"):
            _warn_of_unknown_metrics(runner, evaluate_one_batch(result.compact, runner, batch))
        with _refused('build the compact network from its config', _CONFIG_HINT):
            if is_main_process():
                _check_config(result, runner)
        with _refused('serialise the compact checkpoint', "fix the data set's metainfo"):
            if is_main_process():
                _check_serialisable(compact_checkpoint(result, runner.cfg, run_meta(runner)))
    log(
        f'ContractHook: dry run on one batch: {len(result.layers)} layers contracted, verified '
        f'(largest relative error {result.verification.max_error:.1e}) and evaluated; the compact '
        'config builds the network, and the checkpoint can be written'
    )


def _warn_of_unknown_metrics(runner: Runner, metrics: dict[str, float]) -> None:
    """Log a warning if ``save_best`` names a metric that the evaluator does not return."""
    for hook in runner.hooks if metrics else ():
        wanted = hook.key_indicators if isinstance(hook, CheckpointHook) and hook.save_best else []
        if absent := [key for key in wanted if key not in ('auto', *metrics)]:
            log(
                f'save_best={absent[0]!r} is not a metric of the evaluator, so that the first '
                f'validation will fail; use one of {", ".join(metrics)}',
                logging.WARNING,
            )


_CONFIG_HINT = 'make the config build the trained model without mmexpand'


def _check_config(result: Contraction, runner: Runner) -> None:
    if not has_model(runner.cfg):
        log(
            'ContractHook will write compact checkpoints without a compact config: the Runner has '
            'no config of its model',
            logging.WARNING,
        )
        return
    written = Config.fromstring(make_compact_config(runner.cfg).pretty_text, '.py')
    built = build_compact_model(written)
    built.load_state_dict(result.compact.state_dict(), strict=True)


def _check_serialisable(checkpoint: dict) -> None:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)


@contextmanager
def _refused(step: str, way_out: str) -> Iterator[None]:
    try:
        with together():
            yield
    except Exception as error:
        raise DryRunError(
            f'post-training step "{step}" would fail: {describe(error)}; {way_out}'
        ) from error
