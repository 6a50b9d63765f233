"""Table 6 of the paper, to the last digit."""

import pytest
import torch
from torch import nn

import mmexpand
from mmexpand import ExpandConfig


def small_net() -> nn.Module:
    """Four 7x7 convolutions 3-8-16-32-64 with batch norm, ReLU and pooling, then 256-64-10."""
    layers = []
    for inside, out in zip((3, 8, 16, 32), (8, 16, 32, 64), strict=True):
        layers += [nn.Conv2d(inside, out, 7, padding=3), nn.BatchNorm2d(out), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 64), nn.Linear(64, 10))


def in_the_papers_units(params: int) -> str:
    return f'{params / 1e6:.2f}M' if params >= 1e6 else f'{params / 1e3:.2f}K'


@pytest.mark.parametrize(
    ('method', 'include', 'counts'),
    [
        ('cl', None, ('562.95K', '2.17M', '8.58M')),
        ('ck', None, ('237.72K', '653.25K', '2.07M')),
        ('fc', '17', ('339.40K', '675.91K', '1.74M')),
    ],
)
def test_parameter_counts_of_table_6(method, include, counts):
    model = small_net()
    assert in_the_papers_units(sum(p.numel() for p in model.parameters())) == '150.35K'
    for rate, expected in zip((2, 4, 8), counts, strict=True):
        model = small_net()
        cfg = ExpandConfig(method, rate, include=include, init='default')
        plan = mmexpand.plan(model, cfg)
        mmexpand.expand_(model, cfg)
        params = sum(p.numel() for p in model.parameters())
        assert params == plan.params_after
        assert in_the_papers_units(params) == expected


@pytest.mark.parametrize('method', ['cl', 'ck', 'cl+fc', 'ck+fc', 'auto', 'fc'])
def test_the_papers_network_contracts_exactly(method):
    torch.manual_seed(0)
    compact = small_net().double()
    expanded = small_net().double()
    mmexpand.expand_(expanded, ExpandConfig(method, 2, init='default'))
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    optimizer = torch.optim.SGD(expanded.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        expanded(x).square().mean().backward()
        optimizer.step()
    contracted = mmexpand.contract(expanded)
    assert list(contracted.state_dict()) == list(compact.state_dict())
    mmexpand.verify(expanded, contracted, lambda model: model(x), tolerance=1e-12)
    with torch.no_grad():
        assert not torch.allclose(contracted.eval()(x), compact.eval()(x))
