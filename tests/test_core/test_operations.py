"""The operations that a block adds to a training step, which is what small layers cost on a GPU."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmexpand
from mmexpand import ExpandConfig
from mmexpand.core.units import FEW

CHANNELS = 3, 16, 32, 64, 128, 128


class Counter(TorchDispatchMode):
    """Counts the operations that reach a device, views included."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Not those of no tensor: torch.promote_types is one.
        self.count += any(isinstance(a, Tensor | list | tuple) for a in args)
        return func(*args, **(kwargs or {}))


def operations(method):
    """Count the second training step, forward and backward, of five layers."""
    layers = []
    for inputs, outputs in pairwise(CHANNELS):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers[:-1])
    if method:
        mmexpand.expand_(model, ExpandConfig(method=method, forward='folded'))
    x = torch.randn(16, 3, 48, 48)
    with torch.no_grad():
        assert model(x).shape[2:].numel() * 16 >= FEW, 'the last layer sees too few pixels'
    for _ in range(2):
        model.zero_grad()
        counter = Counter()
        with counter:
            model(x).square().mean().backward()
    return counter.count


@pytest.mark.parametrize(
    ('method', 'bound'), [('bn', 40), ('repvgg', 60), ('dbb', 150), ('qarepvgg', 90)]
)
def test_a_block_with_norms_folded_adds_few(method, bound):
    assert (operations(method) - operations(None)) / 5 <= bound
