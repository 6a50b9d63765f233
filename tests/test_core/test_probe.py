"""The pixels that norms in branches are measured on, and what is measured."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmexpand.core import probe
from mmexpand.core.site import Site


@pytest.mark.parametrize('few_inputs', [0, 1000])
@pytest.mark.parametrize('groups', [1, 2, 6])
@pytest.mark.parametrize('kernel', [(3, 3), (1, 3), (1, 1)])
@pytest.mark.parametrize('geometry', [(1, 1, 1), (2, 0, 1), (2, 3, 2)])
def test_statistics_are_those_of_the_outputs(monkeypatch, few_inputs, groups, kernel, geometry):
    """By the covariance of the inputs, as by the outputs: kernels' gradients too."""
    monkeypatch.setattr(probe, 'FEW_INPUTS', few_inputs)
    torch.manual_seed(0)
    stride, padding, dilation = geometry
    layer = nn.Conv2d(6, 6, 3, stride, padding, dilation, groups).double()
    x = torch.randn(2, 6, 12, 11, dtype=torch.float64) + 1
    weight = torch.randn(6, 6 // groups, *kernel, dtype=torch.float64, requires_grad=True)
    measured = probe.Probe(x, Site.of(layer, 1))
    whole = F.pad(weight, [(3 - k) // 2 for k in kernel[::-1] for _ in range(2)])
    outputs = F.conv2d(x, whole, None, stride, padding, dilation, groups).transpose(0, 1).flatten(1)
    assert measured.few_inputs == (few_inputs > 0)
    assert measured.samples == outputs.shape[1]
    expected = outputs.mean(1), outputs.var(1, correction=0)
    found = measured.statistics(torch.stack([torch.ones_like(weight), weight]))
    for ours, theirs in zip([both[1] for both in found], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        (gradient,) = torch.autograd.grad(ours.square().sum(), weight, retain_graph=True)
        (reference,) = torch.autograd.grad(theirs.square().sum(), weight, retain_graph=True)
        assert reference.abs().max() > 0
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ('pixels', 'dense', 'depthwise'),
    [
        (6400, (5, 5), (5, 5)),
        (6399, (3, 3), (5, 3)),
        (2303, (1, 1), (3, 1)),
        (767, (1, 1), (1, 1)),
    ],
)
def test_at_least_256_pixels_are_taken(pixels, dense, depthwise):
    for groups, expected in ((1, dense), (2, dense), (4, depthwise)):
        site = Site.of(nn.Conv2d(4, 4, 3, groups=groups), 1)
        assert probe.steps(pixels, site) == expected


def test_taps_are_of_every_third_row():
    x = torch.arange(8 * 14 * 14.0).view(1, 8, 14, 14).repeat(4, 1, 1, 1)
    site = Site.of(nn.Conv2d(8, 8, 3, padding=1, groups=8), 1)
    taps = probe.Probe(x, site)._taps.view(8, 3, 3, 4, 5, 14)
    assert torch.equal(taps[:, 1, 1], x[:, :, ::3].transpose(0, 1))
    assert torch.equal(taps[:, 0, 1, :, 1:], x[:, :, 2::3].transpose(0, 1))
    assert not taps[:, 0, 1, :, 0].any()
