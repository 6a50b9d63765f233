"""The private parts of torch that core uses do what they are used for."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmexpand.core import compat


def test_versions_count_changes_in_place():
    tensor = torch.zeros(3)
    before = compat.version(tensor)
    tensor.add_(1)
    assert compat.version(tensor) > before
    before = compat.version(tensor)
    assert tensor.sum() and compat.version(tensor) == before
    with torch.inference_mode():
        assert compat.version(torch.zeros(3)) == -1


def test_parameters_that_are_written_are_those_of_the_module():
    conv = nn.Conv2d(2, 3, 1)
    assert set(compat.parameters_of(conv)) == {'weight', 'bias'}
    weight = torch.ones(3, 2, 1, 1)
    compat.parameters_of(conv)['weight'] = weight
    assert conv.weight is weight
    assert torch.equal(conv(torch.ones(1, 2, 1, 1)).flatten(), 2 + conv.bias)


@pytest.mark.parametrize('padding', ['same', (1, 2), 0])
@pytest.mark.filterwarnings('ignore:Using padding=')
def test_padding_by_side_is_what_a_convolution_pads(padding):
    conv = nn.Conv2d(2, 3, (4, 3), padding=padding)
    x = torch.randn(1, 2, 6, 7)
    padded = F.pad(x, compat.padding_by_side(conv))
    torch.testing.assert_close(F.conv2d(padded, conv.weight, conv.bias), conv(x))


@pytest.mark.parametrize('size', [None, (11, 13), (12, 14)])
def test_output_padding_is_that_of_a_call(size):
    conv = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=(0, 1))
    x = torch.randn(1, 2, 6, 7)
    extra = compat.output_padding(conv, x, size)
    found = F.conv_transpose2d(x, conv.weight, conv.bias, 2, 1, extra)
    torch.testing.assert_close(found, conv(x, size))
    assert list(extra) == {None: [0, 1], (11, 13): [0, 0], (12, 14): [1, 1]}[size]


def test_a_class_that_applies_its_kernel_by_itself_is_known():
    class Other(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return input

    assert torch.equal(Other(2, 3, 1)(torch.ones(1, 2, 1, 1)), torch.ones(1, 2, 1, 1))
    assert compat.convolves_as_torch(nn.Conv2d(2, 3, 1))
    assert not compat.convolves_as_torch(Other(2, 3, 1))


@pytest.mark.parametrize('layer', [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_every_convolution_has_the_base_class(layer):
    assert isinstance(layer(2, 3, 1), compat.ConvNd)
    assert not isinstance(nn.Linear(2, 3), compat.ConvNd)


def test_moments_are_mean_and_biased_variance():
    outputs = torch.randn(50, 4, dtype=torch.float64)
    mean, variance = compat.moments(outputs)
    torch.testing.assert_close(mean, outputs.mean(0))
    torch.testing.assert_close(variance, outputs.var(0, correction=0))


def test_operations_on_many_tensors():
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    compat.add_to_all(tensors, 1)
    compat.multiply_all(tensors, torch.tensor(0.5))
    assert [t.tolist() for t in tensors] == [[1.0, 1.5], [2.0]]
    compat.lerp_all(tensors, [torch.tensor([2.0, 2.5]), torch.tensor([4.0])], 0.5)
    assert [t.tolist() for t in tensors] == [[1.5, 2.0], [3.0]]


def test_methods_that_units_override_are_called():
    """``_apply`` moves and casts, ``_load_from_state_dict`` loads."""
    calls = []

    class Spy(nn.Linear):
        def _apply(self, fn, recurse=True):
            calls.append('apply')
            return super()._apply(fn, recurse)

        def _load_from_state_dict(self, *args):
            calls.append('load')
            super()._load_from_state_dict(*args)

    net = nn.Sequential(Spy(2, 3))
    net.double()
    net.load_state_dict(copy.deepcopy(net.state_dict()))
    assert calls == ['apply', 'load']
