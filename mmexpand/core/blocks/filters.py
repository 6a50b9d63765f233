"""Fixed kernels of blocks."""

import math

import torch
from torch import Tensor, nn


def identity_kernel(conv: nn.Conv2d) -> Tensor:
    """Return the 1x1 kernel ``(n, n / groups, 1, 1)`` of the identity for an n -> n layer."""
    inside = conv.weight.shape[1]
    return torch.eye(inside).repeat(len(conv.weight) // inside, 1)[:, :, None, None]


def cosines(channels: int, kernel_size: tuple[int, int]) -> Tensor:
    """Return filters ``(channels, kh, kw)``: half of them vary vertically, half horizontally."""
    half = channels // 2
    frequency = torch.cat((torch.arange(1, half + 1), torch.arange(1, channels - half + 1)))
    down, across = (
        torch.cos(math.pi * frequency[:, None] * (torch.arange(k) + 0.5) / k) for k in kernel_size
    )
    filters = across[:, None, :].repeat(1, kernel_size[0], 1)
    filters[:half] = down[:half, :, None]
    return filters
