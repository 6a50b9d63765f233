"""Transposed convolutions: every block, folded, layer by layer and contracted, is one function."""

import copy
from itertools import product

import pytest
import torch
from test_blocks import ALL, LINEAR, NORMED, name, trained
from test_units import relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mmexpand
from mmexpand import ExpandConfig, ExpandedConv2d, ExpandedConvTranspose2d
from mmexpand.analysis.complexity import layer_costs
from mmexpand.core.algebra import transpose
from mmexpand.core.blocks import BLOCKS
from mmexpand.core.expression import STEPS, Probe
from mmexpand.core.leaf import FoldedLeaf
from mmexpand.core.site import Site
from mmexpand.mm.warm_start import pulled_back
from mmexpand.surgery.checkpoint import contract_state_dict, is_expanded_state_dict

CHAINS = [dict(method='cl'), dict(method='ck')]
GEOMETRIES = [
    dict(stride=stride, padding=padding, output_padding=extra, dilation=dilation)
    for stride, padding, extra, dilation in product(
        (1, 2, (3, 2)), (0, 1, (2, 3)), (0, 1, (0, 1)), (1, (2, 1))
    )
    if extra == 0 or stride != 1
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def kernels(how):
    """Those that a block fits: even ones too, where it has no smaller kernels to centre."""
    if 'ck' in how['method']:
        return [5, 7]
    even = how in (dict(method='cl'), dict(method='do'))
    return [3, (5, 3), *([4, (2, 3)] if even else [])]


def transposed(outputs=4, kernel=3, **options):
    return nn.ConvTranspose2d(4, outputs, kernel, **options).double()


@pytest.mark.parametrize('how', [*CHAINS, *ALL], ids=name)
@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('outputs', [4, 8])
def test_folded_is_layerwise_is_contracted(how, groups, bias, outputs):
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    for geometry, kernel in product(GEOMETRIES, kernels(how)):
        conv = transposed(outputs, kernel, groups=groups, bias=bias, **geometry)
        unit = trained(ExpandedConvTranspose2d.from_conv(conv, 2, **how)).eval()
        reference = unit.forward_layerwise(x)
        assert relative_error(conv(x), reference) > 0.1, 'the unit was to be another function'
        contracted = unit.to_conv()
        assert type(contracted) is nn.ConvTranspose2d
        assert str(contracted) == str(conv)
        assert contracted.state_dict().keys() == conv.state_dict().keys()
        assert relative_error(contracted(x), reference) < 1e-10
        assert relative_error(unit(x), reference) < 1e-10
        if unit.is_linear:
            for unit.forward_order in ('folded', 'layerwise', 'auto'):
                assert relative_error(unit.train()(x), reference) < 1e-10
