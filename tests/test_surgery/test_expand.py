"""Whole models: expand, train, contract."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import mmexpand
from mmexpand import ExpandConfig, ExpandedConv2d, ExpandedLinear
from mmexpand.surgery import named_units


class Net(nn.Module):
    """Shared, frozen, transposed, depthwise and linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)
        self.head_a = nn.Conv2d(8, 8, 3, padding=1)
        self.head_b = self.head_a
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.classify = nn.Linear(4, 5)
        self.stem[0].weight.requires_grad_(False)

    def forward(self, x):
        x = self.depthwise(self.stem(x))
        x = self.up(self.head_a(x) + self.head_b(x.relu()))
        return self.classify(x.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


def perturb(model):
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.parametrize('method', ['cl', 'ck', 'fc', 'auto', 'cl+fc', 'ck+fc'])
@pytest.mark.parametrize('forward', ['layerwise', 'folded', 'auto'])
def test_contract_gives_back_the_network(net, method, forward):
    keys, types = list(net.state_dict()), [type(m) for m in net.modules()]
    original = copy.deepcopy(net)
    mmexpand.expand_(net, ExpandConfig(method, 2, init='default', forward=forward))
    assert mmexpand.is_expanded(net)
    perturb(net)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expanded = net.eval()(x)
    compact = mmexpand.contract(net)
    assert mmexpand.is_expanded(net)
    assert not mmexpand.is_expanded(compact)
    assert list(compact.state_dict()) == keys
    assert [type(m) for m in compact.modules()] == types
    torch.testing.assert_close(compact(x), expanded, rtol=0, atol=1e-12)
    assert not torch.allclose(original.eval()(x), expanded)
    assert mmexpand.contract_(net) is net
    torch.testing.assert_close(net(x), expanded, rtol=0, atol=1e-12)


def test_a_shared_layer_is_replaced_once_for_both_names(net):
    plan = mmexpand.expand_(net, ExpandConfig(method='cl', include='head_a'))
    assert [layer.names for layer in plan] == [('head_a', 'head_b')]
    assert net.head_a is net.head_b
    assert isinstance(net.head_a, ExpandedConv2d)
    mmexpand.contract_(net)
    assert net.head_a is net.head_b
    assert type(net.head_a) is nn.Conv2d


def test_frozen_layers_stay_frozen(net):
    mmexpand.expand_(net, method='cl')
    assert not any(factor.weight.requires_grad for factor in net.stem[0].factors)
    assert all(factor.weight.requires_grad for factor in net.depthwise.factors)
    mmexpand.contract_(net)
    assert not net.stem[0].weight.requires_grad
    assert net.stem[0].bias.requires_grad


def test_twice_is_harmless(net):
    cfg = ExpandConfig('cl+fc', 2)
    mmexpand.expand_(net, cfg)
    units = named_units(net)
    assert not mmexpand.expand_(net, cfg)
    assert named_units(net) == units
    assert all(isinstance(f, nn.Conv2d) for f in net.stem[0].factors)
    once = mmexpand.contract(net)
    assert list(mmexpand.contract(once).state_dict()) == list(once.state_dict())


def test_nothing_is_changed_when_a_check_fails(net):
    modules = list(net.modules())
    for cfg in (
        ExpandConfig(method='cl', include=['stem', 'nowhere']),
        ExpandConfig('ck', include='stem'),
        ExpandConfig(method='cl', rate=0.5, init='preserve'),
    ):
        with pytest.raises(ValueError):
            mmexpand.expand_(net, cfg)
        assert list(net.modules()) == modules


def test_options_by_name_are_those_of_the_config(net):
    expected = mmexpand.plan(net, ExpandConfig('repvgg', include='stem'))
    assert mmexpand.plan(net, method='repvgg', include='stem') == expected
    assert mmexpand.expand_(net, method='repvgg', include='stem') == expected
    assert list(named_units(net)) == ['stem.0']


def test_a_plan_is_executed(net):
    plan = mmexpand.plan(net, method='cl', rate=2)
    removed = plan.layers.pop(0)
    assert mmexpand.expand_(net, plan) is plan
    assert [name for layer in plan for name in layer.names] == [
        'depthwise',
        'head_a',
        'head_b',
        'up',
    ]
    assert list(named_units(net)) == [layer.name for layer in plan]
    for layer in plan:
        unit = net.get_submodule(layer.name)
        assert (unit.method, unit.rate) == ('cl', 2)
        assert tuple(map(tuple, unit.factor_shapes)) == layer.factor_shapes
    assert type(net.get_submodule(removed.name)) is nn.Conv2d
    assert sum(p.numel() for p in net.parameters()) == plan.params_after


def test_a_plan_that_does_not_fit_is_refused(net):
    plan = mmexpand.plan(net, method='cl', rate=2)
    other = copy.deepcopy(plan)
    other.layers[1] = replace(other.layers[1], rate=3)
    modules = list(net.modules())
    for wrong, words in ((other, 'depthwise cannot be expanded'), (plan, 'head_a cannot be')):
        if wrong is plan:
            net.head_a = net.head_b = nn.Conv2d(8, 8, 5, padding=2)
            modules = list(net.modules())
        with pytest.raises(ValueError, match=words):
            mmexpand.expand_(net, wrong)
        assert list(net.modules()) == modules


@pytest.mark.parametrize(
    ('cfg', 'options', 'words'),
    [
        ('repvgg', {}, "cfg must be an ExpandConfig, got 'repvgg'"),
        (ExpandConfig(method='cl'), dict(rate=2), 'rate is given in addition to cfg'),
        (None, dict(metod='cl'), "unknown option 'metod' .*near matches: method"),
    ],
)
def test_options_that_cannot_be_used_are_refused(net, cfg, options, words):
    for function in (mmexpand.plan, mmexpand.expand_):
        with pytest.raises(TypeError, match=words):
            function(net, cfg, **options)
    with pytest.raises(TypeError, match='rate is given in addition to cfg'):
        mmexpand.expand_(net, mmexpand.plan(net, method='cl'), rate=2)
    assert not mmexpand.is_expanded(net)


def test_hooks_on_a_layer_carry_over(net):
    calls = []
    net.depthwise.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    net(x)
    mmexpand.expand_(net, method='cl')
    net(x)
    mmexpand.contract_(net)
    net(x)
    assert len(calls) == 3


def test_a_model_that_is_one_layer():
    unit = ExpandedLinear.from_linear(nn.Linear(3, 2))
    assert type(mmexpand.contract(unit)) is nn.Linear
    with pytest.raises(ValueError, match='single layer'):
        mmexpand.expand_(nn.Conv2d(3, 4, 3), method='cl')


def test_preserve_keeps_the_function(net):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = net.eval()(x)
    mmexpand.expand_(net, ExpandConfig('cl+fc', 4, init='preserve'))
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-12)
