"""Models that hold layers, or their parameters, beside the tree of modules."""

import copy
from collections import OrderedDict, namedtuple

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import nn

import mmexpand
from mmexpand import ExpandConfig, ExpandedConv2d


class Lists(nn.Module):
    """Runs its layers from a list, a tuple and a dictionary, by keyword; has state of its own."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.ordered = [self.a, (self.b,)]
        self.named = {'last': dict(layer=self.b)}
        self.note = 'fresh'

    def forward(self, x):
        x = self.ordered[0](input=x)
        x = self.ordered[1][0](input=x).relu()
        return self.named['last']['layer'](input=x)

    def get_extra_state(self):
        return dict(note=self.note)

    def set_extra_state(self, state):
        self.note = state['note']


class Averaged(nn.Module):
    """Owns a running average of a part of itself."""

    def __init__(self, update_buffers):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.average = ExponentialMovingAverage(
            self.net, momentum=0.1, update_buffers=update_buffers
        )

    def forward(self, x):
        if self.training:
            self.average.update_parameters(self.net)
        return self.net(x) + self.average(x)


class Cached(nn.Module):
    """Keeps a parameter for later."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(8, 8, 3)
        self.penalised = [self.b.weight]

    def forward(self, x):
        return self.b(self.a(x)) + self.penalised[0].square().sum()


def train(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
    return x


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def check(model, layers):
    """Trained, contracted in a copy, and in place."""
    fresh = copy.deepcopy(model)
    mmexpand.expand_(model, ExpandConfig(method='cl', rate=2, init='default'))
    before = copy.deepcopy(model.state_dict())
    x = train(model)
    model.eval()
    for key, value in before.items():
        if 'factors' in key:
            assert not torch.equal(model.state_dict()[key], value), f'{key} was not trained'
    compact = mmexpand.contract(model)
    result = mmexpand.verify(model, compact, lambda m: m(x), tolerance=1e-10)
    assert result.how == dict.fromkeys(layers, 'in the model')
    fresh.load_state_dict(compact.state_dict())
    torch.testing.assert_close(fresh.eval()(x), model(x))
    assert not mmexpand.is_expanded(mmexpand.contract_(model))
    torch.testing.assert_close(model(x), compact(x), rtol=0, atol=0)
    return model


def test_layers_in_plain_containers_are_the_units():
    model = Lists().double()
    model.note = 'trained'
    model = check(model, ['a', 'b'])
    assert model.note == 'trained'
    assert model.ordered[0] is model.a
    assert type(model.a) is nn.Conv2d


@pytest.mark.parametrize('update_buffers', [False, True])
def test_an_average_in_a_model_follows_the_factors(update_buffers):
    check(Averaged(update_buffers).double(), ['net.0', 'average.module.0'])


def test_a_layer_whose_parameter_is_kept_elsewhere_is_left_out_with_the_reason():
    model = Cached().double()
    plan = mmexpand.expand_(model, ExpandConfig(method='cl', rate=2))
    assert [layer.name for layer in plan] == ['a']
    assert isinstance(model.a, ExpandedConv2d)
    (skipped,) = plan.skipped
    assert skipped.name == 'b'
    assert 'penalised' in skipped.reason
    before = model.penalised[0].clone()
    train(model)
    assert not torch.equal(model.b.weight, before)
    assert model.penalised[0] is model.b.weight


def test_containers_of_other_classes():
    Pair = namedtuple('Pair', 'first second')

    class Fixed(dict):
        __setitem__ = update = None

    class Tagged(tuple):
        def __new__(cls, tag, *items):
            return super().__new__(cls, items)

    class Containers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.ordered = OrderedDict(a=self.a)
            self.pair = Pair(self.b, None)
            # They hold no layer, and cannot be changed.
            self.fixed, self.tagged = Fixed(a=[1]), Tagged('tag', 1, 2)

        def forward(self, x):
            return self.pair.first(self.ordered['a'](x))

    net = Containers()
    x = torch.randn(1, 3, 8, 8)
    expected = net(x)
    mmexpand.expand_(net, method='cl', rate=2)
    assert net.ordered['a'] is net.a and net.pair == Pair(net.b, None)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_with_a_forward_set_on_it_is_kept():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    original = net[0].forward
    net[0].forward = lambda x: 2 * original(x)
    mmexpand.expand_(net, method='cl', rate=2)
    assert type(net[0]) is nn.Conv2d and isinstance(net[1], ExpandedConv2d)
