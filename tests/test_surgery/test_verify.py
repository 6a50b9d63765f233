"""A comparison that fails when it should."""

import copy

import pytest
import torch
from torch import nn

import mmexpand
from mmexpand.surgery import VerificationError


@pytest.fixture
def models():
    torch.manual_seed(0)
    expanded = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Dropout(0.5)
    )
    mmexpand.expand_(expanded)
    return expanded, mmexpand.contract(expanded)


def forward(model):
    return dict(out=[model(torch.ones(1, 3, 8, 8))], size=8)


def test_equal_models_pass_and_are_left_as_they_were(models):
    expanded, compact = models
    expanded[1].eval()
    before = copy.deepcopy(expanded.state_dict())
    result = mmexpand.verify(expanded, compact, forward)
    assert result.max_error < 1e-5
    assert set(result.layers) == {'0', '3'}
    assert (expanded.training, expanded[1].training, compact.training) == (True, False, True)
    assert 'forward' not in vars(expanded[0])
    assert not expanded[0]._forward_hooks
    for name, value in expanded.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_worst_layer_is_named(models):
    expanded, compact = models
    with torch.no_grad():
        compact[3].weight[0, 0, 0, 0] += 1
    with pytest.raises(VerificationError, match='worst layer 3'):
        mmexpand.verify(expanded, compact, forward)
    assert 'forward' not in vars(expanded[0])


def test_errors_do_not_cancel_and_nan_does_not_pass(models):
    expanded, compact = models
    with torch.no_grad():
        compact[3].bias += torch.tensor([1.0, -1.0, 1.0, -1.0])
    with pytest.raises(VerificationError):
        mmexpand.verify(expanded, compact, forward)
    with torch.no_grad():
        compact[3].bias.fill_(float('nan'))
    with pytest.raises(VerificationError):
        mmexpand.verify(expanded, compact, forward)


def test_other_shapes_and_unreached_layers_are_refused(models):
    expanded, compact = models
    with pytest.raises(VerificationError, match='shape'):
        mmexpand.verify(
            expanded, compact, lambda m: m(torch.ones(1, 3, 8 if m is compact else 9, 8))
        )
    with pytest.raises(VerificationError, match='reached'):
        mmexpand.verify(expanded, compact, lambda m: torch.ones(1))
