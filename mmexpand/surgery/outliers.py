"""Kernels in which large weights make int8 and float16 lose the small ones."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from ..core.algebra import transpose

FAR = 10
"""Ratio from which on a weight counts as far above the others."""


def outlying_channel(kernel: Tensor) -> str:
    """Return a description of an output channel whose largest weight is far above the median's.

    Beside such a channel, a quantisation scale for all channels loses the other channels. The
    kernel has output channels first. Return '' if no channel is far above the median channel.
    """
    tops = kernel.detach().abs().flatten(1).float().amax(1)
    top, channel = tops.max(0)
    median = tops.median()
    if len(tops) < 3 or top <= FAR * median:
        return ''
    return f'channel {channel} has a weight of {top:.3g}, the median channel one of {median:.3g}'


def outlying_weight(kernel: Tensor) -> str:
    """Return a description of a weight that is far above the others of its output channel.

    Beside such a weight, a quantisation scale for each channel loses the channel's other weights.
    The kernel has output channels first. Return '' if no weight is far above the others.
    """
    rows = kernel.detach().abs().flatten(1).float()
    if rows.shape[1] < 3:
        return ''
    # A channel with a single weight that is not zero loses nothing.
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
    """Yield a description of each named layer of a compact model with such a channel."""
    for name in names:
        layer = model.get_submodule(name)
        kernel = layer.weight
        if isinstance(layer, nn.ConvTranspose2d):
            kernel = transpose(kernel, layer.groups)  # Output channels first.
        words = outlying_channel(kernel)
        if words:
            yield f'{name}: {words}'
