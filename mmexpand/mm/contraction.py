"""From an expanded model to files: contract, verify on a real batch, evaluate, write."""

import copy
import logging
import os
import random
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object, broadcast, is_main_process
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn

from ..surgery import Verification, VerificationError, contract, copy_model, verify
from ..surgery.checkpoint import META_KEY, CheckpointError, save_checkpoint
from ..surgery.verify import ALONE, IN_STEP
from ..version import __version__
from .checkpoints import describe_units
from .compact_config import make_compact_config
from .models import input_channels, raw_forward

CONFIG_NAME = 'compact_config.py'

T = TypeVar('T')


class ContractionError(RuntimeError):
    """A model that could not be contracted, verified, evaluated or written; says why."""


OURS = (ContractionError, VerificationError, CheckpointError)
"""Errors whose message is a sentence."""


@dataclass
class Contraction:
    """A contracted model with what was found out about it.

    Attributes:
        compact: the compact model, on the device of the expanded one.
        layers: what was expanded, by layer name.
        verification: errors by layer and end to end; None on other ranks than the main one.
        metrics_expanded: of the val loop, before; empty without one.
        metrics_compact: of the val loop, after.
    """

    compact: nn.Module
    layers: dict[str, dict]
    verification: Verification | None
    metrics_expanded: dict[str, float] = field(default_factory=dict)
    metrics_compact: dict[str, float] = field(default_factory=dict)


def contract_and_check(
    expanded: nn.Module, runner: Runner, evaluate_expanded: bool = False
) -> Contraction:
    """Contract a copy of a model, verify it on a real batch, evaluate it with the val loop.

    To be called on all ranks: what fails on one of them fails on all, and none waits for it.

    Args:
        expanded: the model; it is left as it was.
        runner: whose data and val loop are used.
        evaluate_expanded: whether to evaluate the expanded model as well.

    Raises:
        ContractionError: on all ranks, naming what failed first.
    """
    expanded = together(lambda: copy_model(expanded))
    # Every process keeps running statistics of its own; what is evaluated is what is written.
    for value in expanded.state_dict().values():
        broadcast(value)
    compact = together(lambda: contract(expanded))
    verification = together(
        lambda: _verify(expanded, compact, _first_batch(runner)) if is_main_process() else None
    )
    result = Contraction(compact, describe_units(expanded), verification)
    if runner._val_loop is not None:
        if evaluate_expanded:
            result.metrics_expanded = _evaluate(expanded, runner)
        result.metrics_compact = _evaluate(compact, runner)
    return result


def rehearse(expanded: nn.Module, runner: Runner, check: Callable[[Contraction], None]) -> None:
    """Do with the untrained model, on one batch, what will be done with the trained one.

    What is drawn at random afterwards is what would have been drawn without it.

    Args:
        expanded: the model; it is left as it was.
        runner: whose data, evaluator and config are used; none of its state changes.
        check: what else is to succeed with the contraction.

    Raises:
        ContractionError: on all ranks, naming what fails.
    """

    def run() -> None:
        expanded_copy = copy_model(expanded)
        compact = contract(expanded_copy)
        batch = _first_batch(runner)
        # Weights that were just initialised can overflow; what is rehearsed is the way.
        verification = _verify(expanded_copy, compact, batch)
        if runner._val_loop is not None:
            _evaluate_batch(compact, runner, batch)
        check(Contraction(compact, describe_units(expanded_copy), verification))

    with _random_state():
        together(run)


def together(action: Callable[[], T]) -> T:
    """Run something on all ranks; what fails on one of them is raised on all.

    Raises:
        ContractionError: naming the error of the first rank that has one.
    """
    result, reason = None, ''
    try:
        result = action()
    except Exception as error:
        reason = str(error) if isinstance(error, OURS) else f'{type(error).__name__}: {error}'
        print_log(traceback.format_exc(), logger='current', level=logging.DEBUG)
    reasons = [reason for reason in all_gather_object(reason) if reason]
    if reasons:
        raise ContractionError(reasons[0])
    return result


@contextmanager
def _random_state() -> Iterator[None]:
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


def contract_without_data(expanded: nn.Module, height: int, width: int) -> Contraction:
    """Contract a copy of a model and verify it on random images, without any data set.

    Args:
        expanded: the model; it is left as it was.
        height: of the images.
        width: of the images.

    Raises:
        VerificationError: if the compact model computes something else.
    """
    compact = contract(expanded)
    shape = (2, input_channels(compact), height, width)
    data = dict(inputs=torch.randn(shape, device=next(compact.parameters()).device))
    verification = verify(expanded, compact, raw_forward(data))
    return Contraction(compact, describe_units(expanded), verification)


def _first_batch(runner: Runner) -> Any:
    """The first images of the validation set, or of the training set.

    Not by the loader's iterator: an infinite sampler would go on from there.
    """
    loop = runner.val_loop if runner._val_loop is not None else runner.train_loop
    loader = loop.dataloader
    count = min(loader.batch_size or 1, len(loader.dataset))
    return loader.collate_fn([loader.dataset[index] for index in range(count)])


def _verify(expanded: nn.Module, compact: nn.Module, batch: Any) -> Verification:
    data = expanded.data_preprocessor(copy.deepcopy(batch), False)

    def step(mode: str) -> Callable[[nn.Module], Any]:
        return lambda model: model(**copy.deepcopy(data), mode=mode)

    return verify(expanded, compact, raw_forward(data), steps=(step('predict'), step('loss')))


def _evaluate_batch(model: nn.Module, runner: Runner, batch: Any) -> None:
    evaluator = copy.deepcopy(runner.val_loop.evaluator)
    model.eval()
    with torch.no_grad():
        outputs = model.val_step(copy.deepcopy(batch))
    evaluator.process(data_samples=outputs, data_batch=batch)
    for metric in evaluator.metrics:
        try:
            metric.compute_metrics(metric.results)
        except Exception as error:
            log(
                f'ContractHook: {type(metric).__name__} has nothing to say of one batch '
                f'({type(error).__name__}: {error})'
            )


def _evaluate(model: nn.Module, runner: Runner) -> dict[str, float]:
    """The val loop, with nothing in it that other ranks wait for when it fails here."""
    loop = runner.val_loop
    errors: list[Exception] = []

    def forgiving(compute: Callable) -> Callable:
        def compute_metrics(results: list) -> dict:
            try:
                return compute(results)
            except Exception as error:
                errors.append(error)
                return {}

        return compute_metrics

    def run_batches() -> None:
        model.eval()
        for index, batch in enumerate(loop.dataloader):
            loop.run_iter(index, batch)

    def raise_errors() -> None:
        if errors:
            raise errors[0]

    with _stand_in(runner, model):
        together(run_batches)
        metrics = loop.evaluator.metrics
        for metric in metrics:
            metric.compute_metrics = forgiving(metric.compute_metrics)
        try:
            result = loop.evaluator.evaluate(len(loop.dataloader.dataset))
        finally:
            for metric in metrics:
                del metric.compute_metrics
    together(raise_errors)
    return _plain(result)


@contextmanager
def _stand_in(runner: Runner, model: nn.Module) -> Iterator[None]:
    """The runner with another model and no hooks: they would save, log, or swap EMA weights."""
    kept, hooks, modes = runner.model, runner._hooks, {m: m.training for m in model.modules()}
    runner.model, runner._hooks = model, []
    try:
        yield
    finally:
        runner.model, runner._hooks = kept, hooks
        for module, mode in modes.items():
            module.training = mode


def write_compact_checkpoint(result: Contraction, path: Path, cfg: Config, meta: dict) -> None:
    """Write the compact checkpoint, whole or not at all.

    It holds the state dict, the data set's meta and what was found out, in plain values:
    ``torch.load(weights_only=True)`` reads it.

    Args:
        result: of ``contract_and_check``.
        path: the file.
        cfg: the config that was trained.
        meta: what else its ``meta`` shall say, the data set's meta among it.
    """
    report = dict(
        kind='compact',
        version=__version__,
        layers=result.layers,
        metrics_expanded=result.metrics_expanded,
        metrics_compact=result.metrics_compact,
        max_error=result.verification.max_error,
        output_error=result.verification.output,
        layer_errors=result.verification.layers,
        verified=result.verification.how,
    )
    meta = {**meta, 'cfg': make_compact_config(cfg).pretty_text, META_KEY: report}
    state_dict = {name: value.cpu() for name, value in result.compact.state_dict().items()}
    if not all(value.isfinite().all() for value in state_dict.values()):
        raise ContractionError('its weights are not finite: training has diverged')
    save_checkpoint(dict(meta=_plain(meta), state_dict=state_dict), path)


def write_compact_config(cfg: Config, directory: Path) -> Path:
    """Write the compact config beside the checkpoints; returns its path."""
    path = directory / CONFIG_NAME
    temporary = path.with_name(f'.{os.getpid()}.{path.name}')
    make_compact_config(cfg).dump(temporary)
    os.replace(temporary, path)
    return path


def check_writable(directory: str | os.PathLike, option: str = '--work-dir') -> None:
    """Refuse a folder that cannot be written to, before any work is lost.

    Args:
        directory: it is made where it is missing.
        option: what names another one.

    Raises:
        PermissionError: naming the folder.
    """
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise PermissionError(
            f'cannot write to {directory} ({error.strerror}); name another folder with {option}'
        ) from error


def report_lines(title: str, result: Contraction) -> list[str]:
    """What to tell the user about a contraction, for the log."""
    errors = result.verification
    lines = [
        f'{title}: {len(result.layers)} layers contracted; largest relative error '
        f'{errors.output:.2e} end to end, {errors.layers[errors.worst_layer]:.2e} by layer '
        f'({errors.worst_layer})'
    ]
    for how in (IN_STEP, ALONE):
        names = [name for name, found in errors.how.items() if found == how]
        if names:
            lines.append(f'{title}: compared {how}: {", ".join(names)}')
    for name, value in result.metrics_compact.items():
        if isinstance(value, float):
            before = result.metrics_expanded.get(name)
            expanded = '' if before is None else f'{before:.4f} expanded, '
            lines.append(f'{title}: {name} {expanded}{value:.4f} compact')
    return lines


def log(message: str, level: int = logging.INFO) -> None:
    """Log to the Runner's logger."""
    print_log(message, logger='current', level=level)


def _plain(value: Any) -> Any:
    """Plain Python values, which need no pickle to be trusted; what has none is its text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
