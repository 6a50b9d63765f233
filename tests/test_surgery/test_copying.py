"""Copies of models that are in use compute with their own weights."""

import copy
import pickle
from dataclasses import dataclass
from functools import wraps

import pytest
import torch
from torch import nn

from mmexpand.surgery.copying import copy_model


@dataclass
class Kept:
    """An object with an output in it, as InstanceData is."""

    value: torch.Tensor


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.convs = [self.conv]

    def forward(self, x):
        self.last = self.conv(x)
        self.nested = dict(a=[self.last, Kept(self.last * 2)])
        return self.last


def test_outputs_that_a_model_keeps_are_copied_without_their_history():
    net = Net()
    net(torch.ones(1, 3, 8, 8))
    with pytest.raises(RuntimeError, match='graph leaves'):
        copy.deepcopy(net)
    copied = copy_model(net)
    assert torch.equal(copied.last, net.last)
    assert copied.last is copied.nested['a'][0]
    assert not copied.last.requires_grad
    assert not copied.nested['a'][1].value.requires_grad
    assert net.last.requires_grad
    assert copied.convs[0] is copied.conv
    assert copied.conv is not net.conv


def checkpointed(forward):
    """As mmengine's activation checkpointing wraps a forward."""

    @wraps(forward)
    def wrapper(*args):
        return forward(*args)

    return wrapper


@pytest.mark.parametrize('times', [1, 2])
def test_a_replaced_forward_calls_the_copy(times):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    for module in (net[0], net):
        for _ in range(times):
            module.forward = checkpointed(module.forward)
    x = torch.ones(1, 3, 8, 8)
    before = net(x)
    copied = copy_model(net)
    with torch.no_grad():
        copied[0].weight.zero_()
        copied[0].bias.fill_(3)
    assert (copied(x) == 3).all()
    assert torch.equal(net(x), before)
    copied[0] = nn.Conv2d(3, 1, 1)
    assert copied(x).shape[1] == 1, 'a replaced layer is not called'


def test_functions_without_modules_stay_themselves():
    net = nn.Conv2d(3, 4, 3)
    net.act, net.scaled = torch.nn.functional.relu, lambda x, times=2: times * x
    copied = copy_model(net)
    assert copied.act is torch.nn.functional.relu and copied.scaled is net.scaled
    del copied.scaled
    assert pickle.loads(pickle.dumps(copied)).act is torch.nn.functional.relu


def test_defaults_and_functions_that_refer_to_themselves():
    net = nn.Conv2d(3, 4, 3)
    original = net.forward

    def forward(x, times=2, run=original, *, module=net):
        if times > 1:
            return forward(x, times - 1) + module(x, 1)
        return run(x)

    net.forward = forward
    x = torch.randn(1, 3, 8, 8)
    expected = net(x)
    copied = copy_model(net)
    assert torch.equal(copied(x), expected)
    nn.init.zeros_(copied.weight)
    nn.init.zeros_(copied.bias)
    assert not copied(x).any() and torch.equal(net(x), expected)
