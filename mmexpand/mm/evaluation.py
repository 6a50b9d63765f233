"""The val loop with another model than the Runner's, on all of its data or on one batch."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
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


def evaluate(model: nn.Module, runner: Runner) -> dict[str, float]:
    """The metrics of the val loop; to be called on all ranks, and failing on all of them.

    Args:
        model: it is left in the mode that it is in.
        runner: without a val loop there are no metrics.
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
        # mmdet's loop over teacher and student gives its metrics to hooks alone.
        metrics = loop.run() or recorder.metrics
    _raise_first(errors['batch'])
    # Of what is left when a batch failed, a metric may fail as well: that is not the cause.
    _raise_first(errors['metric'])
    return {name: _plain_or_words(value) for name, value in metrics.items()}


def evaluate_one_batch(model: nn.Module, runner: Runner, batch: Any) -> None:
    """Run prediction and evaluation on one batch; nothing of it stays in the evaluator.

    A metric that cannot be computed on so little is mentioned in the log and no failure; so is an
    evaluator that cannot be copied.

    Args:
        model: it is left in the mode that it is in.
        runner: without a val loop, or with one of another kind than mmengine's, nothing is done.
        batch: of the val loop's data loader.
    """
    if not has_val_loop(runner) or not isinstance(runner.val_loop, ValLoop):
        return
    loop = runner.val_loop
    kept = loop.evaluator
    dry_runs = kept.__dict__.pop('dry_runs', [])  # Not to be copied, nor collected.
    try:
        try:
            with together():
                copied = copy.deepcopy(kept)
        except Exception as error:
            log(f'Evaluation is not tried: the evaluator cannot be copied ({describe(error)})')
            return
        loop.evaluator = copied
        # Not collected before the original: a metric's temporary folder is removed with either.
        ending = [m for m in loop.evaluator.metrics if hasattr(type(m), '__del__')]
        dry_runs += ending
        with (
            _stand_in(runner, model),
            _silent(),
            _surviving(loop, [batch]) as errors,
            together(),
        ):
            loop.run()
    finally:
        loop.evaluator = kept
        kept.dry_runs = dry_runs
    _raise_first(errors['batch'])
    for error in errors['metric']:
        log(f'A metric cannot be computed on one batch, which proves nothing ({describe(error)})')


def first_batch(runner: Runner, train_batch: Any = None) -> tuple[Any, bool]:
    """Return a batch of the val loop, or else of the train loop, and whether it is the latter's.

    Args:
        runner: whose loops are built.
        train_batch: what the train loop has read; None: nothing.
    """
    if has_val_loop(runner):
        return read_batch(runner.val_loop.dataloader), False
    if train_batch is None:
        train_batch = read_batch(runner.train_loop.dataloader)
    return train_batch, True


def read_batch(loader: DataLoader) -> Any:
    """Return the first batch of a data loader that is not being iterated over.

    The data set is read where the loader reads it: by a worker, if it has workers. A data set
    that opens its files at the first sample must not do so in this process: workers that are
    started later would inherit the open files, and share their positions.

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
    """A batch as the model gets it; of a training's the images are not mixed or resized at random.

    Args:
        model: an OpenMMLab model.
        batch: of a data loader; it is left as it is.
        training: whether of the train loop's, whose images may be of several sizes until then.
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
    """Plain Python values, which need no pickle to be trusted.

    Args:
        value: any nesting of dictionaries and sequences of plain values, arrays and tensors.
        name: what to call it where it cannot be converted.

    Raises:
        TypeError: naming the key of a value that is something else.
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
        f'{name} is a {type(value).__name__}, which no checkpoint can hold safely: make it a '
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
    """What a val loop says that it has found."""

    def __init__(self):
        self.metrics: dict = {}

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self.metrics = metrics or {}


@contextmanager
def _stand_in(runner: Runner, model: nn.Module, *hooks: Hook) -> Iterator[None]:
    """The runner with another model and other hooks: its own save, log, or swap EMA weights."""
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
    """The val loop, on these batches, going on to its end whatever fails in between.

    Ranks meet where results are gathered: one that stopped before would leave the others waiting.
    A loop of another kind than mmengine's is left as it is.
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
    """Batches of a data set, as far as they can be read."""

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


@contextmanager
def _silent() -> Iterator[None]:
    """Without the tables that evaluators log: of one batch they would mislead."""
    logger = MMLogger.get_current_instance()
    kept, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = kept
