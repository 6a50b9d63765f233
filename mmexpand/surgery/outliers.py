"""Weights far above the others of their kernel, beside which int8 and float16 lose the others."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

FAR = 10
"""How many times as large as the others a weight has to be to be called far above them."""


def outlying_channel(kernel: Tensor) -> str:
    """Words on an output channel whose largest weight is far above the median channel's; or ''.

    A scale that all channels share loses the others beside it.

    Args:
        kernel: output channels first.
    """
    tops = kernel.detach().abs().flatten(1).float().amax(1)
    top, channel = tops.max(0)
    median = tops.median()
    if len(tops) < 3 or top <= FAR * median:
        return ''
    return f'channel {channel} has a weight of {top:.3g}, the median channel one of {median:.3g}'


def outlying_weight(kernel: Tensor) -> str:
    """Words on a weight far above the others of its output channel; or ''.

    A scale for each channel loses the others beside it.

    Args:
        kernel: output channels first.
    """
    rows = kernel.detach().abs().flatten(1).float()
    if rows.shape[1] < 3:
        return ''
    # Of a channel with one weight that is not zero, nothing is lost.
    tops, others = rows.amax(1), rows.topk(rows.shape[1] - 1, largest=False).values
    rms = others.square().mean(1).sqrt().clamp(min=1e-6 * tops.max())
    ratio, channel = (tops / rms).max(0)
    if ratio <= FAR or not others[channel].any():
        return ''
    return (
        f'a weight of channel {channel} is {ratio:.0f} times the root mean square of the '
        "channel's others"
    )


def outlying_layers(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """A sentence on each of these layers that has a channel far above the others.

    Args:
        model: a compact model.
        names: of layers with a ``weight``.
    """
    for name in names:
        words = outlying_channel(model.get_submodule(name).weight)
        if words:
            yield f'{name}: {words}'
