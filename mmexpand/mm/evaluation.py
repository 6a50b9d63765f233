"""Runs of the val loop with another model than the Runner's, on all data or on one batch."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import numpy as np
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import Runner, ValLoop
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ..errors import UserTypeError, UserValueError
from ..surgery.train_mode import kept_train_mode
from .compat import has_val_loop, set_hooks
from .logs import log
from .ranks import describe, together

_COPIES: WeakKeyDictionary[Evaluator, list[BaseMetric]] = WeakKeyDictionary()
"""Copies of metrics, by their evaluator: deleting one could remove the original's temporary folder,
so that they are kept as long as the evaluator."""


def evaluate(model: nn.Module, runner: Runner) -> dict[str, float]:
    """Return the metrics of the val loop. Call it on all ranks; a failure on one fails on all.

    Args:
        model: the model, whose train or eval mode is kept.
        runner: the Runner; without a val loop the metrics are empty.
    """
    if not has_val_loop(runner):
        return {}
    loop = runner.val_loop
    recorder = _Recorder()
    with (
        _stand_in(runner, model, recorder),
        _surviving(loop, loop.dataloader) as errors,
        together(),
    ):
        # mmdet's TeacherStudentValLoop returns no metrics and gives them to hooks only.
        metrics = loop.run() or recorder.metrics
    _raise_first(errors['batch'])
    # A failed batch can make a metric fail too, so that the batch's error comes first.
    _raise_first(errors['metric'])
    return {name: _plain_or_words(value) for name, value in metrics.items()}


def evaluate_one_batch(model: nn.Module, runner: Runner, batch: Any) -> dict[str, float]:
    """Return the metrics of one batch, by a copy of the evaluator; empty if they are skipped.

    A metric that fails on one batch, or an evaluator that cannot be copied, is only logged.

    Args:
        model: the model, whose train or eval mode is kept.
        runner: the Runner; without a ``ValLoop`` of mmengine, evaluation is skipped.
        batch: a batch of the val loop's data loader.
    """
    if not has_val_loop(runner) or not isinstance(runner.val_loop, ValLoop):
        return {}
    loop = runner.val_loop
    try:
        with together():
            copied = copy.deepcopy(loop.evaluator)
    except Exception as error:
        log(f'Evaluation is skipped: the evaluator cannot be copied ({describe(error)})')
        return {}
    ending = [metric for metric in copied.metrics if hasattr(type(metric), '__del__')]
    _COPIES.setdefault(loop.evaluator, []).extend(ending)
    with (
        _stand_in(runner, model),
        mock.patch.object(loop, 'evaluator', copied),
        # The tables that evaluators log would mislead for one batch.
        mock.patch.object(MMLogger.get_current_instance(), 'disabled', True),
        _surviving(loop, [batch]) as errors,
        together(),
    ):
        metrics = loop.run()
    _raise_first(errors['batch'])
    for error in errors['metric']:
        log(f'A metric failed on one batch, but may work on all data ({describe(error)})')
    return {} if errors['metric'] else metrics


def first_batch(runner: Runner, train_batch: Any = None) -> tuple[Any, bool]:
    """Return a batch of the val loop, or else of the train loop, and whether it is the latter's.

    Args:
        runner: a Runner with built loops.
        train_batch: a batch of the train loop; None reads one if there is no val loop.
    """
    if has_val_loop(runner):
        return read_batch(runner.val_loop.dataloader), False
    if train_batch is None:
        train_batch = read_batch(runner.train_loop.dataloader)
    return train_batch, True


def read_batch(loader: DataLoader) -> Any:
    """Return the first batch of a data loader that is not being iterated over.

    If the loader has workers, a worker reads the batch: files that a data set opens in this
    process would be inherited by later workers, which would share the files' positions.

    Raises:
        ValueError: if the loader has no batch.
    """
    if type(loader).__iter__ is not DataLoader.__iter__:
        return next(iter(loader))
    options: dict[str, Any] = dict(collate_fn=loader.collate_fn)
    if isinstance(loader.dataset, IterableDataset):
        options.update(batch_size=loader.batch_size, drop_last=loader.drop_last)
    elif loader.batch_sampler is None:
        options.update(batch_size=None, sampler=list(islice(loader.sampler, 1)))
    else:
        options.update(batch_sampler=list(islice(loader.batch_sampler, 1)))
    if loader.num_workers:
        options.update(worker_options(loader), worker_init_fn=loader.worker_init_fn)
    for batch in DataLoader(loader.dataset, **options):
        return batch
    raise UserValueError(
        f'the data loader of {type(loader.dataset).__name__} has no batch: '
        f'{len(loader.dataset)} samples, batch_size={loader.batch_size}, '
        f'drop_last={loader.drop_last}; add samples, or reduce the batch size'
    )


def worker_options(loader: DataLoader) -> dict[str, Any]:
    """Return the options of a data loader with one worker, started as the workers of another."""
    return dict(
        num_workers=1,
        multiprocessing_context=loader.multiprocessing_context,
        timeout=loader.timeout,
    )


def preprocess(model: nn.Module, batch: Any, training: bool) -> dict:
    """Return a preprocessed batch, without random mixing or resizing of training images.

    Args:
        model: an OpenMMLab model.
        batch: a batch of a data loader, which is not changed.
        training: whether the batch is the train loop's, whose images may differ in size.
    """
    preprocessor = model.data_preprocessor
    augments = getattr(preprocessor, 'batch_augments', None)
    try:
        if augments is not None:
            preprocessor.batch_augments = None
        return preprocessor(copy.deepcopy(batch), training)
    finally:
        if augments is not None:
            preprocessor.batch_augments = augments


def plain(value: Any, name: str = '') -> Any:
    """Convert values to plain Python values, which load without trusting a pickle.

    Args:
        value: any nesting of dictionaries and sequences of plain values, arrays and tensors.
        name: name of the value in the message of an error.

    Raises:
        TypeError: naming the key of a value of another type.
    """
    if isinstance(value, dict):
        return {str(key): plain(item, f'{name}.{key}'.lstrip('.')) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item, f'{name}.{index}') for index, item in enumerate(value)]
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return plain(value.tolist(), name)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise UserTypeError(
        f'{name} is a {type(value).__name__}, which a checkpoint cannot hold safely: make it a '
        'string, a number, or a list or dictionary of these'
    )


def _plain_or_words(value: Any) -> Any:
    try:
        return plain(value)
    except TypeError:
        return str(value)


def _raise_first(errors: list[Exception]) -> None:
    with together():
        if errors:
            raise errors[0]


class _Recorder(Hook):
    """A hook that records the metrics of a val loop."""

    def __init__(self):
        self.metrics: dict = {}

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self.metrics = metrics or {}


@contextmanager
def _stand_in(runner: Runner, model: nn.Module, *hooks: Hook) -> Iterator[None]:
    """Replace a Runner's model, and its hooks, which save, log or swap weights, in this context."""
    kept, own = runner.model, runner.hooks
    runner.model = model
    set_hooks(runner, list(hooks))
    try:
        with kept_train_mode(model):
            yield
    finally:
        runner.model = kept
        set_hooks(runner, own)


@contextmanager
def _surviving(loop: Any, batches: Any) -> Iterator[dict[str, list[Exception]]]:
    """Make a val loop run on batches to its end and yield the errors in between.

    Ranks gather results at the end: a rank that stopped earlier would leave the others waiting.
    A loop that is not mmengine's ``ValLoop`` is not changed.
    """
    errors: dict[str, list[Exception]] = dict(batch=[], metric=[])
    if not isinstance(loop, ValLoop):
        yield errors
        return
    kept, metrics = loop.dataloader, loop.evaluator.metrics
    loop.dataloader = _Batches(batches, kept.dataset, errors['batch'])
    loop.run_iter = _keeping(loop.run_iter, errors['batch'], None)
    for metric in metrics:
        metric.compute_metrics = _keeping(metric.compute_metrics, errors['metric'], {})
    try:
        yield errors
    finally:
        loop.dataloader = kept
        del loop.run_iter
        for metric in metrics:
            del metric.compute_metrics


def _keeping(function: Callable, errors: list[Exception], otherwise: Any) -> Callable:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return otherwise if errors else function(*args, **kwargs)
        except Exception as error:
            errors.append(error)
            return otherwise

    return wrapper


class _Batches:
    """A sequence of batches that ends at the first batch which cannot be read."""

    def __init__(self, batches: DataLoader | list, dataset: Any, errors: list[Exception]):
        self.dataset = dataset
        self._batches = batches
        self._errors = errors

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._batches
        except Exception as error:
            self._errors.append(error)
