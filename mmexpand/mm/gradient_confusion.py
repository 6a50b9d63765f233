"""A hook that measures gradient confusion while a network trains."""

import json
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner, set_random_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ..analysis.confusion import FACTORS, FOLDED, cosine_similarity, density, draw, gradients
from ..errors import UserValueError
from ..files import save_figure, write_text
from ..stack import check_installed
from ..surgery import contract, is_expanded
from ..surgery.copying import copy_model
from .checkpoints import unwrap
from .evaluation import worker_options
from .logs import log
from .random_state import random_state_kept
from .ranks import on_main

FILE, PICTURE = 'gradient_confusion.json', 'gradient_confusion.png'


class GradientConfusionHook(Hook):
    """A hook that measures gradient confusion (Sec. 5.1) before, during and after training.

    Gradient confusion is the smallest cosine similarity of the loss's gradients on pairs of random
    mini-batches of the training data. It is measured by the trained parameters, as in the paper,
    and by the contracted network's, which allow a comparison of compact and expanded networks. The
    hook writes ``gradient_confusion.json`` into the work dir, and after training
    ``gradient_confusion.png`` with the Gaussian kernel density of the last measurement.

    Training is the same as without the hook: weights, statistics, random numbers and the order of
    the data do not change. Gradients are computed on a copy, in training mode and full precision,
    without weight decay. All processes compute the same, since some losses communicate.

    Args:
        pairs: number of pairs of mini-batches.
        interval: iterations between measurements; None measures after each epoch. A loop that
            counts iterations has a single epoch.
        seed: seed of batches and augmentations, the same for all measurements.

    Raises:
        ImportError: if scipy is missing.
        ValueError: for fewer than two pairs, or an interval below 1.
    """

    def __init__(self, pairs: int = 100, interval: int | None = None, seed: int = 0):
        check_installed('GradientConfusionHook', 'scipy')
        if pairs < 2:
            raise UserValueError(f'pairs must be at least 2, got {pairs}')
        if interval is not None and interval < 1:
            raise UserValueError(
                f'interval must be at least 1, or None for every epoch, got {interval}'
            )
        self.pairs, self.interval, self.seed = pairs, interval, seed

    def before_train(self, runner: Runner) -> None:
        """Measure before training, after reading the earlier measurements of a resumed run.

        Raises:
            ValueError: if the training data has no length, which drawing batches requires.
        """
        if isinstance(runner.train_dataloader.dataset, IterableDataset):
            raise UserValueError(
                'GradientConfusionHook cannot draw batches from an IterableDataset: remove the hook'
            )
        self._path = Path(runner.work_dir) / FILE
        self.measured: list[dict] = []
        if runner.iter and self._path.is_file():
            found = json.loads(self._path.read_text())['measured']
            self.measured = [record for record in found if record['iter'] <= runner.iter]
        self._measure(runner, runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None
    ) -> None:
        """Measure at the end of each interval."""
        if self.interval and self.every_n_train_iters(runner, self.interval):
            self._measure(runner, runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        """Measure after each epoch, or only after the last one if there is an interval."""
        if self.interval is None or self.is_last_train_epoch(runner):
            self._measure(runner, runner.iter)

    def after_train(self, runner: Runner) -> None:
        """Write the density of the last measurement and the plot."""
        if not self.measured:
            return
        densities = {
            space: density(self.measured[-1][space]['similarities']) for space in (FACTORS, FOLDED)
        }
        on_main(lambda: self._write(density=densities))
        path = Path(runner.work_dir) / PICTURE
        on_main(lambda: save_figure(draw({'': [self.measured]}), path))
        log(f'GradientConfusionHook: {self._path}, {path}')

    def _measure(self, runner: Runner, step: int) -> None:
        if any(record['iter'] == step for record in self.measured):
            return
        found = measure(unwrap(runner.model), runner.train_dataloader, self.pairs, self.seed)
        minima = {space: min(values, default=math.nan) for space, values in found.items()}
        left = min(map(len, found.values()))
        if left < self.pairs:
            log(
                f'GradientConfusionHook: {self.pairs - left} of {self.pairs} pairs at iteration '
                f'{step} are skipped: a gradient is zero or not finite',
                logging.WARNING,
            )
        if not left:
            return
        record = {s: dict(minimum=minima[s], similarities=v) for s, v in found.items()}
        self.measured.append(dict(iter=step, **record))
        on_main(self._write)
        words = ', '.join(f'{value:.4f} by {space}' for space, value in minima.items())
        log(f'GradientConfusionHook: iteration {step}: minimum cosine similarity {words}')

    def _write(self, **more: Any) -> None:
        content = dict(pairs=self.pairs, seed=self.seed, measured=self.measured, **more)
        write_text(json.dumps(content), self._path)


def measure(model: nn.Module, loader: DataLoader, pairs: int, seed: int) -> dict[str, list[float]]:
    """Return cosine similarities of gradients on pairs of random batches, without side effects.

    Args:
        model: the trained model, without a distributed wrapper.
        loader: the data loader of the training data.
        pairs: number of pairs of batches.
        seed: seed of batches and augmentations.

    Returns:
        The finite similarities by factors and by folded kernels, equal for a compact model.
    """
    expanded = copy_model(model)
    networks = {FACTORS: expanded}
    if is_expanded(model):
        networks[FOLDED] = contract(model)
    for network in networks.values():
        network.train()  # A validation leaves eval mode.
    found: dict[str, list[float]] = {space: [] for space in networks}
    with random_state_kept():
        set_random_seed(seed)
        batches = iter(random_batches(loader, 2 * pairs, seed))
        for _ in range(pairs):
            pair = [expanded.data_preprocessor(next(batches), True) for _ in range(2)]
            for space, network in networks.items():
                value = cosine_similarity(*(_gradients(network, data) for data in pair))
                if math.isfinite(value):
                    found[space].append(round(value, 6))
    return {FOLDED: found[FACTORS], **found}


def random_batches(loader: DataLoader, count: int, seed: int) -> DataLoader:
    """Return a loader of random batches of another loader's data set, read by a worker.

    Samples that transforms keep and files that the data set opens stay in the worker, so that the
    data set of this process does not change.

    Args:
        loader: the data loader of the training data.
        count: number of batches.
        seed: seed of the augmentations; torch's generator draws the order.
    """
    size = getattr(loader.batch_sampler, 'batch_size', 1)
    order: list[int] = []
    while len(order) < count * size:
        order += torch.randperm(len(loader.dataset)).tolist()
    return DataLoader(
        loader.dataset,
        batch_sampler=[order[i * size : (i + 1) * size] for i in range(count)],
        collate_fn=loader.collate_fn,
        worker_init_fn=partial(_seed_worker, then=loader.worker_init_fn, seed=seed),
        **worker_options(loader),
    )


def _seed_worker(worker: int, then: Callable | None, seed: int) -> None:
    if then is not None:
        then(worker)
    # The loader's own function sets seeds that differ by rank.
    set_random_seed(seed)


def _gradients(network: nn.Module, data: dict) -> list[Tensor]:
    loss, _ = network.parse_losses(network(**data, mode='loss'))
    return gradients(network, loss)
