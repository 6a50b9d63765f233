"""ReLU between the factors: the same keys as the linear chain, another function, no kernel."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mmexpand
from mmexpand import ExpandConfig, ExpandedConv2d, ExpandedLinear
from mmexpand.core.blocks import methods

CHAINS = [('cl', 3), ('cl', 1), ('ck', 7), ('auto', 5)]


def conv(size=3):
    return nn.Conv2d(4, 6, size, stride=2, padding=size // 2).double()


@pytest.mark.parametrize(('method', 'size'), CHAINS)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('forward', ['auto', 'layerwise'])
def test_a_convolution_is_its_factors_with_relu_between(method, size, training, forward):
    unit = ExpandedConv2d.from_conv(
        conv(size), rate=2, method=method, forward=forward, nonlinear='relu'
    ).train(training)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    expected = x
    for index, f in enumerate(unit.factors):
        expected = expected.relu() if index else expected
        expected = F.conv2d(expected, f.weight, f.bias, f.stride, f.padding, f.dilation)
    torch.testing.assert_close(unit(x), expected, rtol=1e-12, atol=1e-12)
    linear = ExpandedConv2d.from_conv(conv(size), rate=2, method=method)
    linear.load_state_dict(unit.state_dict(), strict=True)
    assert (linear(x) - expected).abs().max() > 0.01
    assert linear(x).shape == unit(x).shape


def test_a_linear_layer_too():
    unit = ExpandedLinear.from_linear(nn.Linear(5, 3).double(), rate=2, nonlinear='relu')
    x = torch.randn(7, 5, dtype=torch.float64)
    a, b, c = unit.factors
    torch.testing.assert_close(unit(x), c(b(a(x).relu()).relu()))
    torch.testing.assert_close(unit.eval()(x), c(b(a(x).relu()).relu()))


def test_groups_and_other_padding():
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode='reflect').double()
    unit = ExpandedConv2d.from_conv(layer, rate=2, nonlinear='relu')
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    a, b, c = unit.factors
    assert (a.groups, b.groups, c.groups) == (2, 2, 2)
    expected = c(b(a(F.pad(x, (1, 1, 1, 1), mode='reflect')).relu()).relu())
    torch.testing.assert_close(unit(x), expected)


def test_there_is_no_kernel():
    unit = ExpandedConv2d.from_conv(conv(), rate=2, nonlinear='relu')
    no_layer = 'ReLU between its factors.*no single layer is equal to it'
    for action in (unit.to_conv, unit.fold, lambda: unit.set_weight(torch.zeros(6, 4, 3, 3), None)):
        with pytest.raises(ValueError, match=no_layer):
            action()
    # An initialisation that asks finds no weight, and leaves the factors their own.
    assert not hasattr(unit, 'weight')
    assert not hasattr(unit, 'bias')
    model = nn.Sequential(conv(), nn.ReLU(), conv(5))
    mmexpand.expand_(model, ExpandConfig('auto', 2, include='0', nonlinear='relu'))
    with pytest.raises(ValueError, match=no_layer):
        mmexpand.contract(model)


@pytest.mark.parametrize('method', [m for m in methods() if m.split('+')[0] not in 'clckfcauto'])
def test_other_blocks_are_refused(method):
    with pytest.raises(ValueError, match=f"between the factors of.*not with method='{method}'"):
        ExpandConfig(method, nonlinear='relu')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(nonlinear='gelu'), "nonlinear must be one of 'relu', got 'gelu'"),
        (dict(shortcut=True), 'not with shortcut=True'),
        (dict(init='preserve'), "no kernel to preserve or to fold: remove init='preserve'"),
        (dict(forward='folded'), "remove init='default' and forward='folded'"),
    ],
)
def test_what_needs_a_kernel_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ExpandConfig(**dict(dict(method='cl', nonlinear='relu'), **changes))
