"""Gradient confusion (Sec. 5.1): how far the gradients of mini-batches agree.

Source: Sankararaman et al., "The Impact of Neural Network Overparameterization on Gradient
Confusion and Stochastic Gradient Descent", 2019. Functions import scipy and matplotlib, since this
layer requires torch alone.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTORS, FOLDED = 'factors', 'folded'
"""Gradients by the trained parameters, and by those of the contracted network."""

TITLES = {FACTORS: 'by factors', FOLDED: 'by folded kernels'}

GRID = 401
"""Points from -1 to 1 at which a density is evaluated."""

Record = Mapping[str, object]
"""A measurement: its 'iter', and for each space the 'similarities' and their 'minimum'."""


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Return the gradients of a loss by all trained parameters: zeros for unused ones.

    Args:
        model: a model, whose ``grad`` are overwritten.
        loss: a scalar.
    """
    model.zero_grad(set_to_none=True)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]


def cosine_similarity(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the cosine of two gradients, each a list of tensors; NaN if one is zero."""
    scale = math.sqrt(_dot(first, first) * _dot(second, second))
    return _dot(first, second) / scale if scale else math.nan


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    pairs = zip(first, second, strict=True)
    return sum(float((a.double() * b.double()).sum()) for a, b in pairs)


def density(similarities: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return a Gaussian kernel density with the bandwidth of Scott's rule.

    Returns:
        The points and the density there; both empty without two different values.
    """
    import numpy as np
    from scipy.stats import gaussian_kde

    if len(set(similarities)) < 2:
        return [], []
    points = np.linspace(-1, 1, GRID)
    return points.tolist(), gaussian_kde(similarities)(points).tolist()


def draw(runs: Mapping[str, Sequence[Sequence[Record]]]) -> 'Figure':
    """Plot the minimum during training, averaged over runs, and the density at the end.

    Args:
        runs: measurements of each run, by the name of the network.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout='constrained')
    for (left, right), (space, title) in zip(figure.subplots(2, 2), TITLES.items(), strict=True):
        for name, measured in runs.items():
            steps, means = _mean_minimum(measured, space)
            left.plot(steps, means, marker='.', label=name)
            last = [value for records in measured for value in records[-1][space]['similarities']]
            right.plot(*density(last), label=name)
        left.set(xlabel='iteration', ylabel='minimum cosine similarity', title=title)
        right.set(xlabel='cosine similarity, last measurement', ylabel='density', title=title)
        right.set_xlim(-1, 1)
        for axes in (left, right):
            axes.grid(alpha=0.3)
            if len(runs) > 1:
                axes.legend()
    return figure


def _mean_minimum(runs: Sequence[Sequence[Record]], space: str) -> tuple[list[int], list[float]]:
    by_step: dict[int, list[float]] = {}
    for record in (record for records in runs for record in records):
        by_step.setdefault(record['iter'], []).append(record[space]['minimum'])
    return sorted(by_step), [fmean(by_step[step]) for step in sorted(by_step)]
