"""In which order a unit multiplies: factors and input are one chain of matrices (Sec. 3.1, Eq. 1).

Neighbouring factors can be multiplied first, once for all pixels ('folded'), or each can be
applied to the image in turn ('layerwise'), or anything between.
"""

from collections.abc import Sequence
from functools import lru_cache

from .algebra import fold_order, kernel_size
from .expression import Shape

FORWARDS = ('auto', 'layerwise', 'folded')

Segments = tuple[tuple[int, int], ...]
"""Half-open ranges of factors: each range is multiplied out, then applied to the image."""


@lru_cache(maxsize=4096)
def cheapest_segments(shapes: tuple[Shape, ...], pixels: tuple[int, ...], groups: int) -> Segments:
    """The order of association with the fewest multiply-accumulate operations.

    Args:
        shapes: kernel shapes of the factors, the one applied first in front.
        pixels: output pixels of every factor, batch included: a range of factors that is
            multiplied out is applied at the pixels of its last factor.
        groups: the number of groups.
    """
    best: list[tuple[float, Segments]] = [(0, ())]
    for stop in range(1, len(shapes) + 1):
        best.append(
            min(
                (
                    best[start][0] + count_macs(shapes, pixels, groups, ((start, stop),)),
                    (*best[start][1], (start, stop)),
                )
                for start in range(stop)
            )
        )
    return best[-1][1]


def count_macs(
    shapes: Sequence[Shape],
    pixels: Sequence[int],
    groups: int,
    segments: Segments,
    with_folding: bool = True,
) -> int:
    """Multiply-accumulate operations of a forward pass in a given order of association.

    Args:
        shapes: as in ``cheapest_segments``.
        pixels: as in ``cheapest_segments``.
        groups: the number of groups.
        segments: the order.
        with_folding: whether to count the products of factors, not only their application.
    """
    return sum(
        _apply_macs(shapes, pixels, start, stop)
        + with_folding * _fold_macs(shapes, groups, start, stop)
        for start, stop in segments
    )


def _apply_macs(shapes: Sequence[Shape], pixels: Sequence[int], start: int, stop: int) -> int:
    height, width = kernel_size(shapes[start:stop])
    return pixels[stop - 1] * shapes[stop - 1][0] * shapes[start][1] * height * width


def _fold_macs(shapes: Sequence[Shape], groups: int, start: int, stop: int) -> int:
    per_group = tuple((out // groups, *rest) for out, *rest in shapes)
    return groups * fold_order(per_group, start, stop)[0]
