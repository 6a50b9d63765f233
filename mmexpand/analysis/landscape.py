"""The loss around a network's weights, along filter-normalised random directions (Sec. 5.2).

Source: Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018. Functions import
matplotlib, since this layer requires torch alone.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..errors import UserValueError
from ..surgery.copying import copy_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Direction = Mapping[str, Tensor]
"""A step for every parameter, by its name."""

LEVELS = 24
"""Contours of a plane."""


def random_direction(model: nn.Module, generator: torch.Generator) -> Direction:
    """Return a Gaussian direction whose filters have the norms of the model's.

    A filter computes one output: a kernel of a convolution, a row of a linear layer. Parameters of
    one dimension (biases and norms) do not move.

    Args:
        model: the compact network: networks of the same shapes then share their axes.
        generator: a generator on the CPU.
    """
    groups = {
        module.weight: module.groups
        for module in model.modules()
        if isinstance(module, _ConvTransposeNd)
    }
    return {
        name: _like(parameter.detach(), generator, groups.get(parameter))
        for name, parameter in model.named_parameters()
    }


def _like(parameter: Tensor, generator: torch.Generator, transposed: int | None) -> Tensor:
    if parameter.dim() <= 1:
        return torch.zeros_like(parameter)
    step = torch.randn(parameter.shape, generator=generator).to(parameter)
    # Filters along the first dimension, all other values along the second. A transposed
    # convolution has its filters in its second dimension, group by group.
    groups = transposed or parameter.shape[0]
    by_filter = (t.unflatten(0, (groups, -1)) for t in (parameter, step))
    others = [1, *range(3, parameter.dim() + 1)] if transposed else [*range(1, parameter.dim() + 1)]
    norms, own = (torch.linalg.vector_norm(t, dim=others, keepdim=True) for t in by_filter)
    return (step.unflatten(0, (groups, -1)) * (norms / own)).flatten(0, 1)


@torch.no_grad()
def losses_at(
    model: nn.Module,
    directions: Sequence[Direction],
    points: Sequence[Sequence[float]],
    loss: Callable[[nn.Module], float],
) -> Iterator[float]:
    """Yield the loss at points around a model's weights.

    Args:
        model: the network, which is not changed.
        directions: the axes.
        points: the steps along the axes for each point.
        loss: returns the loss of the model.
    """
    for point in points:
        # Buffers that a forward pass changes must be equal at all points.
        moved = copy_model(model)
        for name, parameter in moved.named_parameters():
            steps = zip(point, directions, strict=True)
            parameter.add_(sum(step * axis[name] for step, axis in steps))
        yield loss(moved)


def draw(landscapes: Sequence[Mapping]) -> 'Figure':
    """Plot the losses along the first direction of all networks, and a plane for each.

    Args:
        landscapes: for each network its 'name', the 'steps', the losses on a 'line', and on a
            'plane' by second and first direction; None for losses that are not finite.

    Raises:
        ValueError: if no loss is finite and above 0.
    """
    from matplotlib.figure import Figure

    rows = [row for one in landscapes for row in one['plane']]
    values = [value for row in rows for value in row if value is not None and value > 0]
    if not values:
        raise UserValueError(
            'no loss is finite and above 0; use a checkpoint of a training that converged'
        )
    # Losses grow by orders of magnitude, so contours have equal ratios.
    levels = [min(values) * (max(values) / min(values)) ** (i / LEVELS) for i in range(LEVELS + 1)]
    count, span = 1 + len(landscapes), max(one['steps'][-1] for one in landscapes)
    figure = Figure(figsize=(4.6 * count, 4.2), layout='constrained')
    first, *others = figure.subplots(1, count, subplot_kw=dict(xticks=(-span, 0, span)))
    for one in landscapes:
        line = [math.nan if value is None else value for value in one['line']]
        first.plot(one['steps'], line, marker='.', label=one['name'])
    first.set(xlabel='first direction', ylabel='loss', yscale='log')
    first.grid(alpha=0.3)
    first.legend()
    for axes, one in zip(others, landscapes, strict=True):
        _draw_plane(axes, one, levels)
        axes.set(title=one['name'], xlabel='first direction', ylabel='second direction')
        axes.set_yticks((-span, 0, span))
    return figure


def _draw_plane(axes: 'Axes', one: Mapping, levels: list[float]) -> None:
    plane = [[math.nan if value is None else value for value in row] for row in one['plane']]
    lines = axes.contour(one['steps'], one['steps'], plane, levels=levels, norm='log')
    axes.clabel(lines, lines.levels[::2], fontsize='x-small', fmt='%.3g')
    axes.plot(0, 0, 'k+')
    axes.set_aspect('equal')
