"""Which factors a layer becomes: the three strategies of Sec. 3.1 and 3.2, as shapes."""

import math
from collections.abc import Sequence
from numbers import Real

METHODS = ('cl', 'ck', 'fc', 'auto', 'cl+fc', 'ck+fc')
"""Values of ``method``. A convolution is expanded by 'cl' or 'ck', a linear layer by 'fc'."""

Shape = tuple[int, int, int, int]
"""A kernel's shape ``(out, in / groups, kh, kw)``."""


def check_rate(rate: float) -> None:
    """Refuse an expansion rate that is not a finite number above 0.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is not above 0.
    """
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise TypeError(f'rate must be a number above 0, got {rate!r}')
    if not (rate > 0 and math.isfinite(rate)):
        raise ValueError(f'rate must be a number above 0, got {rate!r}')


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of those there are.

    Args:
        key: the name of the option, for the message.
        value: what it was given.
        choices: what it can be.

    Raises:
        ValueError: naming the choices.
    """
    if value not in choices:
        raise ValueError(f'{key} must be one of {", ".join(map(repr, choices))}, got {value!r}')


def conv_method(method: str, kernel_size: tuple[int, int]) -> str:
    """The strategy, 'cl' or 'ck', that ``method`` means for a convolution of this kernel.

    Raises:
        ValueError: if the method does not expand such a convolution; the message is the reason.
    """
    check_choice('method', method, METHODS)
    height, width = kernel_size
    if height != width:
        ck_refusal = f'its kernel is not square ({height}x{width})'
    elif height % 2 == 0:
        ck_refusal = f'its kernel is even ({height}x{width})'
    elif height <= 3:
        ck_refusal = f'its kernel is {height}x{width}'
    else:
        ck_refusal = ''
    strategy = method.removesuffix('+fc')
    if strategy == 'auto':
        return 'cl' if ck_refusal else 'ck'
    if strategy == 'ck' and ck_refusal:
        raise ValueError(
            f"'ck' needs an odd square kernel larger than 3x3, and {ck_refusal}; "
            "use 'cl', or 'auto' to take 'ck' only where it fits"
        )
    if strategy == 'fc':
        raise ValueError("'fc' expands linear layers only; use 'cl', 'ck', 'auto', or 'cl+fc'")
    return strategy


def widen(channels: int, rate: float) -> int:
    """Channels times rate, rounded (half up), at least 1."""
    return max(1, math.floor(channels * rate + 0.5))


def conv_factors(
    method: str, rate: float, in_channels: int, out_channels: int, kernel_size: tuple, groups: int
) -> list[Shape]:
    """Shapes of the factors of a convolution, the one applied first in front.

    Args:
        method: 'cl' (1x1, kxk, 1x1: Sec. 3.1, "arbitrary kernels") or 'ck' ((k - 1) / 2 times
            3x3: "kernel size larger than 3").
        rate: the expansion rate r.
        in_channels: m, of all groups together.
        out_channels: n, of all groups together.
        kernel_size: height and width.
        groups: every group is expanded by itself.
    """
    m, n = in_channels // groups, out_channels // groups
    p, q = widen(m, rate), widen(n, rate)
    if method == 'cl':
        channels, kernels = (m, p, q, n), ((1, 1), tuple(kernel_size), (1, 1))
    else:
        length = (kernel_size[0] - 1) // 2
        channels, kernels = (m, p, *[q] * (length - 2), n), ((3, 3),) * length
    return [
        (out * groups, inside, *kernel)
        for inside, out, kernel in zip(channels[:-1], channels[1:], kernels, strict=True)
    ]


def linear_factors(rate: float, in_features: int, out_features: int) -> list[Shape]:
    """Shapes of the three factors of a linear layer, as 1x1 kernels (Sec. 3.2)."""
    return conv_factors('cl', rate, in_features, out_features, (1, 1), 1)
