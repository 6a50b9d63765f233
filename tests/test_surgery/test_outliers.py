"""Weights far above the others of their kernel."""

import pytest
import torch
from torch import nn

from mmexpand.surgery.outliers import outlying_channel, outlying_layers, outlying_weight


def kernel(kind):
    layer = dict(conv=nn.Conv2d(8, 8, 3), depthwise=nn.Conv2d(8, 8, 3, groups=8))
    return torch.randn(layer[kind].weight.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('kind', ['conv', 'depthwise'])
def test_a_channel_far_above_the_others_is_named(kind):
    weight = kernel(kind)
    assert outlying_channel(weight) == ''
    weight[5] *= 50
    assert outlying_channel(weight).startswith('channel 5 has a weight of')
    # Within the channel nothing has changed.
    assert outlying_weight(weight) == ''
    assert outlying_channel(-weight) == outlying_channel(weight)


def test_a_weight_far_above_the_others_of_its_channel_is_named():
    weight = kernel('conv')
    assert outlying_weight(weight) == ''
    weight[:, 3, 1, 1] = 30
    assert 'channel' in outlying_weight(weight)
    # All channels are alike.
    assert outlying_channel(weight) == ''


@pytest.mark.parametrize('weight', [torch.zeros(4, 3, 3, 3), torch.eye(4), torch.eye(2)])
def test_beside_nothing_there_is_nothing_to_lose(weight):
    assert outlying_channel(weight) == outlying_weight(weight) == ''


def test_layers_are_named():
    model = nn.ModuleDict(dict(a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(3, 8, 3)))
    with torch.no_grad():
        model['b'].weight[2] = 100
    (words,) = outlying_layers(model, ['a', 'b'])
    assert words.startswith('b: channel 2 has a weight of 100, ')


def test_channels_of_a_transposed_convolution_are_its_outputs():
    layer = nn.ConvTranspose2d(8, 12, 3, groups=2)
    layer.weight.data[4:, 3] *= 100  # The second group's fourth output.
    assert 'channel 9 has' in next(outlying_layers(nn.Sequential(layer), ['0']))
