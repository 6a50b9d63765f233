"""The pixels that norms in branches are measured on, and kernels normalised by them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmexpand import ExpandedConv2d
from mmexpand.core import batch_sample
from mmexpand.core.layer_spec import LayerSpec
from mmexpand.core.statistics import FLOOR, Normed, excess

EPS = 1e-5


@pytest.mark.parametrize('groups', [1, 2, 6])
@pytest.mark.parametrize('geometry', [(1, 1, 1), (2, 0, 1), (2, 3, 2)])
@pytest.mark.parametrize('shifts', [True, False])
def test_kernels_are_normalised_by_the_outputs_of_the_layer(groups, geometry, shifts):
    """Values and gradients are those of plain autograd: a sum, and several side by side."""
    torch.manual_seed(0)
    stride, padding, dilation = geometry
    layer = nn.Conv2d(6, 6, 3, stride, padding, dilation, groups).double()
    x = torch.randn(2, 6, 12, 11, dtype=torch.float64) + 1
    measured = batch_sample.BatchSample(x, LayerSpec.of(layer, 1))

    def reference(summed, branches, *tensors):
        weights, biases = [], []
        for index in range(branches):
            kernel, gain, shift = (
                tensors[index::branches] if shifts else (*tensors[index::branches], 0)
            )
            outputs = F.conv2d(x, kernel, None, stride, padding, dilation, groups)
            mean, variance = outputs.mean((0, 2, 3)), outputs.var((0, 2, 3), correction=0)
            scale = gain / ((variance + EPS) * floors[6 * index : 6 * index + len(kernel)]).sqrt()
            weights.append(kernel * scale[:, None, None, None])
            biases.append(shift - mean * scale)
        if summed > 1:
            return sum(weights), sum(biases)
        return torch.cat(weights), torch.cat(biases)

    floors = torch.rand(12, dtype=torch.float64) + 1
    kernels = torch.randn(2, 6, 6 // groups, 3, 3, dtype=torch.float64)
    channels = torch.randn(4 if shifts else 2, 6, dtype=torch.float64)
    tensors = [tensor.clone().requires_grad_() for tensor in (*kernels, *channels)]
    taps = measured.taps((3, 3), torch.float64)
    assert measured.samples == taps.shape[-1]
    for branches, summed in ((2, 2), (2, 1), (1, 1)):
        inputs = [t for i, t in enumerate(tensors) if branches == 2 or i % 2 == 0]
        excesses = floors[: 6 * branches]
        found = Normed.apply(taps, excesses, EPS, summed, branches, *inputs)
        expected = reference(summed, branches, *inputs)
        weights = torch.randn_like(found[0]), torch.randn_like(expected[1])
        # The biases of several side by side, around which there are norms, have no gradient.
        count = 2 if shifts and summed == branches else 1
        assert found[1] is None or found[1].requires_grad == (count == 2)
        gradients = []
        for pair in (found, expected):
            loss = sum((a * b).sum() for a, b in zip(pair[:count], weights, strict=False))
            gradients.append(torch.autograd.grad(loss, inputs, allow_unused=True))
        for ours, theirs in zip(found[: 2 if shifts else 1], expected, strict=False):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        for ours, theirs in zip(*gradients, strict=True):
            assert theirs is None or theirs.abs().max() > 0
            if theirs is None or ours is None:
                assert ours is theirs is None
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('groups', [1, 2])
def test_gradcheck(groups):
    """By finite differences."""
    torch.manual_seed(0)
    taps = torch.randn(*([] if groups == 1 else [groups]), 4, 20, dtype=torch.float64)
    kernels = [torch.randn(4, 1, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    channels = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    floors = torch.rand(8, dtype=torch.float64) + 1
    for summed in (1, 2):
        assert torch.autograd.gradcheck(
            lambda *inputs, n=summed: Normed.apply(taps, floors, EPS, n, 2, *inputs)[:2],
            (*kernels, *channels),
        )


def test_a_channel_without_variance_is_scaled_as_one_at_the_floor():
    variance = torch.tensor([[2.0, 2.0, 1.0, 1e-40], [0.0, 0.0, 0.0, 0.0]])
    expected = variance.mean(1, keepdim=True) * FLOOR / (variance + EPS)
    found = excess(variance, EPS)
    torch.testing.assert_close(found, expected.clamp_min(1))
    assert found[0, 3] > 1e4
    assert (found[0, :3] == 1).all() and (found[1] == 1).all()


@pytest.mark.parametrize(
    ('pixels', 'step'),
    [(6400, (5, 5)), (6399, (5, 3)), (3839, (3, 3)), (2303, (3, 1)), (767, (1, 1))],
)
def test_at_least_256_pixels_are_taken(pixels, step):
    assert batch_sample.steps(pixels, LayerSpec.of(nn.Conv2d(4, 4, 3), 1)) == step


@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize(('size', 'stride'), [(28, 1), (80, 1), (80, 2), (81, 3)])
def test_the_border_counts_in_proportion(groups, size, stride):
    """On bright images the border differs most: statistics are near those of all pixels."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3, stride, padding=1, bias=False, groups=groups)
    x = 3 + F.avg_pool2d(torch.randn(10, 4, size + 8, size + 8), 9, 1)
    measured = batch_sample.BatchSample(x, LayerSpec.of(layer, 1))
    taps = measured.taps((3, 3), torch.float32).reshape(groups, -1, measured.samples)
    assert measured.samples < layer(x)[:, 0].numel() / 3
    sampled = (layer.weight.view(groups, -1, len(taps[0])) @ taps).flatten(0, 1)
    expected = layer(x).transpose(0, 1).flatten(1)
    deviation = expected.std(1)
    assert ((sampled.std(1) / deviation - 1).abs() < 0.15).all()
    assert ((sampled.mean(1) - expected.mean(1)).abs() < 0.1 * deviation).all()


@pytest.mark.parametrize('width', [1, 2, 3, 5, 8])
def test_all_taps_are_of_the_image(width):
    """Every sampled output is an output of the layer, for small and odd sizes too."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 4, 3, (1, 2), (1, 2), (1, 2), bias=False).double()
    x = torch.randn(900, 2, 7, width, dtype=torch.float64)
    taps = batch_sample.BatchSample(x, LayerSpec.of(layer, 1)).taps((3, 3), torch.float64)
    found = (layer.weight.flatten(1) @ taps).T
    outputs = layer(x).movedim(1, -1).flatten(0, 2)
    assert torch.cdist(found[:200], outputs).amin(1).max() < 1e-6


def test_taps_are_of_every_third_row():
    x = torch.arange(8 * 15 * 14.0).view(1, 8, 15, 14).repeat(4, 1, 1, 1)
    spec = LayerSpec.of(nn.Conv2d(8, 8, 3, padding=1, groups=8), 1)
    measured = batch_sample.BatchSample(x, spec)
    taps = measured.taps((3, 3), torch.float32).view(8, 3, 3, 4, 5, 14)
    rows = [slice(first, None, 3) for first in (0, 2, 1, 0)]  # of each image
    thinned = torch.stack([x[i][:, rows[i]] for i in range(4)], 1)
    assert torch.equal(taps[:, 1, 1], thinned)
    above = torch.stack([F.pad(x[i], (0, 0, 1, -1))[:, rows[i]] for i in range(4)], 1)
    assert torch.equal(taps[:, 0, 1], above)
    assert torch.equal(taps[:, 0, 0, ..., 1:], above[..., :-1])
    assert not taps[:, :, 0, ..., 0].any() and not taps[:, :, 2, ..., -1].any()
    assert torch.equal(measured.taps((1, 1), torch.float32).view_as(thinned), thinned)


def test_rounding_gives_no_negative_variance():
    """Kernels whose weights add up to zero, on images that are almost constant."""
    torch.manual_seed(0)
    unit = ExpandedConv2d.from_conv(
        nn.Conv2d(4, 4, 3, groups=4, bias=False), 1, 'repvgg', init='default', forward='folded'
    )
    with torch.no_grad():
        weight = unit.repvgg[0].node.weight
        weight.copy_(torch.randn_like(weight))
        weight.sub_(weight.mean((2, 3), keepdim=True))
        for _ in range(20):
            x = (torch.rand(8, 4, 1, 1) * 50).expand(8, 4, 34, 34)
            assert unit(x + 5e-4 * torch.randn(8, 4, 34, 34)).isfinite().all()
