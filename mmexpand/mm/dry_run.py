"""Before the first step, on one batch: everything that is done after training."""

import io
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from ..errors import UserError
from ..surgery.copying import copy_model
from .checkpoints import unwrap
from .compact_config import make_compact_config
from .compat import has_val_loop
from .contraction import Contraction, compact_checkpoint, contract_and_verify, has_model
from .evaluation import evaluate_one_batch, first_batch
from .logs import log
from .models import build_compact_model
from .ranks import describe, together


class DryRunError(UserError, RuntimeError):
    """What would fail after training, found before it; the message names the way out."""


class DryRunHook(Hook):
    """The dry run, when the train loop has read its first batch.

    No earlier: the loop's workers are started by then, so that they inherit nothing of what is
    read for the dry run.

    Args:
        meta: gives what the compact checkpoint's meta will say.

    Attributes:
        batch: of a Runner that does not validate, the latest that the train loop has read.
    """

    def __init__(self, meta: Callable[[Runner], dict]):
        self.batch: Any = None
        self._meta = meta
        self._tried = False

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Try what is done after training, before the first step.

        Raises:
            DryRunError: if it would fail.
        """
        if not has_val_loop(runner):
            self.batch = data_batch
        if not self._tried:
            self._tried = True
            dry_run(unwrap(runner.model), runner, self._meta(runner), data_batch)


def dry_run(model: nn.Module, runner: Runner, meta: dict, train_batch: Any) -> None:
    """Contract, verify, evaluate, format and serialise once, on all ranks.

    Nothing of it stays: random states, data loaders, the evaluator and the model are left alone,
    so that training goes on exactly as without.

    Args:
        model: the expanded model, without a distributed wrapper.
        runner: the Runner, about to train.
        meta: what the compact checkpoint's meta will say beside what is found out.
        train_batch: of the train loop, for a Runner that does not validate.

    Raises:
        DryRunError: on all ranks, if anything fails.
    """
    with random_state_kept():
        with _refused('reading one batch', 'look at the data loader that the config names'):
            batch, training = first_batch(runner, train_batch)
        with _refused(
            'copying the model', 'keep nothing on it that cannot be copied (locks, files, streams)'
        ):
            expanded = copy_model(model)
        with _refused(
            'contraction', 'leave the layers that it names out with exclude=[...] of ExpandHook'
        ):
            result = contract_and_verify(expanded, batch, training)
        with _refused('evaluating one batch', "look at the val loop's data and evaluator"):
            evaluate_one_batch(result.compact, runner, batch)
        with _refused('building the compact network from its config', _CONFIG_HINT):
            if is_main_process():
                _check_config(result, runner)
        with _refused('serialising the compact checkpoint', "mend the data set's metainfo"):
            if is_main_process():
                _check_serialisable(compact_checkpoint(result, runner.cfg, meta))
    log(
        f'ContractHook: dry run on one batch: {len(result.layers)} layers contracted, verified '
        f'(largest relative error {result.verification.max_error:.1e}) and evaluated; the compact '
        'config builds the network, and the checkpoint can be written'
    )


_CONFIG_HINT = 'the config must build, without mmexpand, the model that is trained'


def _check_config(result: Contraction, runner: Runner) -> None:
    if not has_model(runner.cfg):
        log(
            'ContractHook: the Runner has no config of its model, so that compact checkpoints will '
            'be written without a compact config',
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
            f'after training {step} would fail, so it is refused now: {describe(error)}; {way_out}'
        ) from error


@contextmanager
def random_state_kept() -> Iterator[None]:
    """What comes after this context draws the same random numbers as without it."""
    states: list[Any] = [random.getstate(), np.random.get_state()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
