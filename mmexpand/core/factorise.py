"""Factors with a given product, for ``init='preserve'`` and for loading a compact weight.

The solved factor keeps its random values where they do not change the product. The other factors
are random semi-orthogonal mixtures, because rows of zeros, as in a padded identity, would get no
useful gradient.
"""

import math
from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor

from .algebra import fold

Shape = tuple[int, int, int, int]

BLOCK = 256
"""Largest number of columns of a semi-orthogonal matrix that is drawn as a whole."""

INITS = ('default', 'preserve')
"""Values of ``init``. 'default' (the paper's choice) requires no code: factors are ``torch.nn``
layers, which initialise themselves and which the framework's ``init_cfg`` reaches."""


def cl_refusal(shapes: Sequence[Shape], groups: int) -> str:
    """Return the reason why 1x1, kxk and 1x1 factors cannot have an arbitrary product, or ''.

    Args:
        shapes: shapes of the factors, in the order of application.
        groups: the number of groups.
    """
    m, n, first, last = _channels(shapes, groups)
    if first >= m and last >= n:
        return ''
    return (
        f"factors of {first} and {last} channels can't hold {m} inputs and {n} outputs; "
        'raise the rate'
    )


def ck_refusal(shapes: Sequence[Shape], groups: int) -> str:
    """Return the reason why 3x3 factors cannot have an arbitrary product, or ''.

    Arguments are as for ``cl_refusal``.
    """
    m, n, first, last = _channels(shapes, groups)
    copies = _output_copies(len(shapes)) ** 2
    if first >= 4 * m and last >= copies * n:
        return ''
    needed = max(4, copies) if len(shapes) > 2 else 4
    size = 2 * len(shapes) + 1
    return (
        f'3x3 factors require a rate of {needed} or more for an arbitrary {size}x{size} kernel; '
        'raise the rate'
    )


def _channels(shapes: Sequence[Shape], groups: int) -> tuple[int, int, int, int]:
    return shapes[0][1], shapes[-1][0] // groups, shapes[0][0] // groups, shapes[-1][1]


def _by_group(solve: Callable[[Tensor, list[Tensor]], list[Tensor]]) -> Callable:
    @wraps(solve)
    def solve_groups(kernel: Tensor, weights: list[Tensor], groups: int) -> list[Tensor]:
        per_group = [
            solve(part, [weight.chunk(groups)[index].double() for weight in weights])
            for index, part in enumerate(kernel.double().chunk(groups))
        ]
        return [torch.cat(parts) for parts in zip(*per_group, strict=True)]

    return solve_groups


@_by_group
def factorise_cl(kernel: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Return 1x1, kxk and 1x1 factors in float64 whose product is ``kernel``.

    Args:
        kernel: ``(n, m / groups, kh, kw)``.
        weights: the factors' present weights, which give shapes and random values.
        groups: the number of groups.
    """
    first = _semi_orthogonal(*weights[0].shape[:2], like=kernel)
    last = _semi_orthogonal(weights[2].shape[1], weights[2].shape[0], like=kernel).T
    factors = [first[:, :, None, None], weights[1], last[:, :, None, None]]
    missing = kernel - _product(factors)
    # The cheaper order: (n, m) by (m, p) first, then (q, n) by (n, p).
    inner = torch.einsum('nmhw,pm->nphw', missing, first)
    factors[1] = weights[1] + torch.einsum('nq,nphw->qphw', last, inner)
    return factors


@_by_group
def factorise_ck(kernel: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Return 3x3 factors in float64 whose product is ``kernel``; arguments as ``factorise_cl``."""
    # The first factor makes four copies of every input, shifts each to a corner, and mixes them.
    # The factors behind the second shift copies of every output, each by another distance.
    # Through these shifts the second factor's 3x3 taps cover the whole kernel.
    length, m, n = len(weights), kernel.shape[1], kernel.shape[0]
    mix = _semi_orthogonal(weights[0].shape[0], 4 * m, like=kernel)
    corners = _shifted_copies(m, [(y, x) for y in (0, 2) for x in (0, 2)], like=kernel)
    factors = [torch.einsum('pc,cmhw->pmhw', mix, corners.transpose(0, 1)), *weights[1:]]

    per_axis = _output_copies(length)
    shifts = _shifts(per_axis, 2 * (length - 2))
    unmix = torch.eye(n, dtype=kernel.dtype, device=kernel.device)
    for index in range(length - 1, 1, -1):
        steps = [_step(shift, length - 2, index - 2) for shift in shifts]
        places = [(y, x) for y in steps for x in steps]
        if index == length - 1:
            gather = _shifted_copies(n, places, like=kernel)
        else:
            gather = _shifted_diagonal(n, places, like=kernel)
        inner = _semi_orthogonal(weights[index].shape[1], gather.shape[1], like=kernel)
        factors[index] = torch.einsum('oa,abhw,ib->oihw', unmix, gather, inner)
        unmix = inner

    missing = kernel - _product(factors)
    blocks = _spread(missing, shifts, 5).flatten(0, 1)
    taps = _spread(blocks.transpose(0, 1), [0, 2], 3).flatten(0, 1).transpose(0, 1)
    factors[1] = weights[1] + torch.einsum('oa,abhw,ib->oihw', unmix, taps, mix)
    return factors


def _output_copies(length: int) -> int:
    # The number of blocks of 5 taps, per axis, that cover a kernel of 2 * length + 1 taps.
    return math.ceil((2 * length + 1) / 5)


def _shifts(count: int, reach: int) -> list[int]:
    return [round(index * reach / max(1, count - 1)) for index in range(count)]


def _step(shift: int, steps: int, index: int) -> int:
    # The share of one 3x3 factor in the whole shift: each can shift by 0, 1 or 2 taps.
    return shift * (index + 1) // steps - shift * index // steps


def _shifted_copies(channels: int, places: list[tuple[int, int]], like: Tensor) -> Tensor:
    """Return the kernel ``(channels, channels * len(places), 3, 3)`` that sums shifted copies."""
    kernel = like.new_zeros(channels, channels, len(places), 3, 3)
    index = torch.arange(channels)
    for copy, (y, x) in enumerate(places):
        kernel[index, index, copy, y, x] = 1
    return kernel.flatten(1, 2)


def _shifted_diagonal(channels: int, places: list[tuple[int, int]], like: Tensor) -> Tensor:
    """Return the kernel that shifts each of ``channels * len(places)`` copies separately."""
    copies = channels * len(places)
    kernel = like.new_zeros(copies, copies, 3, 3)
    index = torch.arange(copies)
    y, x = (torch.tensor(axis).repeat(channels) for axis in zip(*places, strict=True))
    kernel[index, index, y, x] = 1
    return kernel


def _spread(kernel: Tensor, shifts: list[int], size: int) -> Tensor:
    """Split ``(a, b, k, k)`` into blocks ``(a, len(shifts) ** 2, b, size, size)`` that sum to it.

    A tap in several blocks is divided evenly between them.
    """
    count = kernel.new_zeros(kernel.shape[-1])
    for shift in shifts:
        count[shift : shift + size] += 1
    shared = kernel / (count[:, None] * count)
    blocks = [shared[..., y : y + size, x : x + size] for y in shifts for x in shifts]
    return torch.stack(blocks, dim=1)


def _semi_orthogonal(rows: int, columns: int, like: Tensor) -> Tensor:
    if rows < columns:
        return _semi_orthogonal(columns, rows, like).T
    if columns <= BLOCK:
        return torch.nn.init.orthogonal_(like.new_empty(rows, columns))
    # The time for one orthogonal matrix grows with the cube of its size. Drawing blocks, and then
    # mixing rows of different blocks, takes BLOCK operations per value.
    matrix = like.new_zeros(rows, columns)
    parts = math.ceil(columns / BLOCK)
    for down, across in zip(
        torch.arange(rows).tensor_split(parts),
        torch.arange(columns).tensor_split(parts),
        strict=True,
    ):
        block = _semi_orthogonal(len(down), len(across), like)
        matrix[down[0] : down[-1] + 1, across[0] : across[-1] + 1] = block
    groups = math.ceil(rows / BLOCK)
    for index in range(groups):
        mixed = matrix[index::groups]
        matrix[index::groups] = _semi_orthogonal(len(mixed), len(mixed), like) @ mixed
    return matrix


def _product(factors: list[Tensor]) -> Tensor:
    return fold([(factor, None) for factor in factors])[0]
