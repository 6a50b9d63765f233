"""Private parts of torch, each with the torch version it was tested with.

Tests fail if one of these parts changes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Functions on nested values; torch 2.9.1 has no public module of them.
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_unflatten as tree_unflatten

ConvNd = nn.modules.conv._ConvNd
"""The base class of all convolutions (torch 2.9.1)."""


def version(tensor: Tensor) -> int:
    """Return the number of in-place changes; -1 for inference tensors (torch 2.9.1)."""
    return -1 if tensor.is_inference() else tensor._version


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the writable dictionary of a module's own parameters (torch 2.9.1)."""
    return module._parameters


def padding_by_side(conv: nn.Conv2d) -> list[int]:
    """Return left, right, top and bottom padding, also for padding='same' (torch 2.9.1)."""
    return conv._reversed_padding_repeated_twice


def output_padding(
    conv: nn.ConvTranspose2d, x: Tensor, output_size: Sequence[int] | None
) -> Sequence[int]:
    """Return the output padding for one call of a transposed convolution (torch 2.9.1)."""
    axes = conv.stride, conv.padding, conv.kernel_size, 2, conv.dilation
    return conv._output_padding(x, output_size, *axes)


def convolves_as_torch(conv: nn.Conv2d) -> bool:
    """Return whether a class inherits ``nn.Conv2d._conv_forward`` (torch 2.9.1)."""
    return type(conv)._conv_forward is nn.Conv2d._conv_forward


def moments(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the channels' mean and biased variance of ``(samples, channels)`` (torch 2.9.1)."""
    return torch.batch_norm_update_stats(outputs, None, None, 0.0)


def add_to_all(tensors: Sequence[Tensor], value: float) -> None:
    """Add a number to all tensors in place, in one operation (torch 2.9.1)."""
    torch._foreach_add_(tensors, value)


def multiply_all(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply all tensors by one factor in place, in one operation (torch 2.9.1)."""
    torch._foreach_mul_(tensors, factor)


def lerp_all(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Interpolate each tensor towards its end in place, in one operation (torch 2.9.1)."""
    torch._foreach_lerp_(tensors, ends, weight)
