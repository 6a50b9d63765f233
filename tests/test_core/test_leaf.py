"""The folded kernel as a leaf: the factors' gradients, computed from its gradient."""

import copy

import pytest
import torch
from torch import nn

from mmexpand import ExpandedConv2d
from mmexpand.core.leaf import FoldedLeaf


@pytest.mark.parametrize(
    ('method', 'kernel', 'groups'), [('cl', 3, 1), ('cl', 3, 2), ('ck', 5, 1), ('ck', 7, 4)]
)
def test_factors_receive_the_gradients_of_folding_in_their_own_layout(method, kernel, groups):
    conv = nn.Conv2d(8, 12, kernel, groups=groups).double()
    folded = ExpandedConv2d.from_conv(conv, 4, method, forward='folded')
    unit = copy.deepcopy(folded)
    unit.leaf = FoldedLeaf(unit)
    x = torch.randn(2, 8, 12, 12, dtype=torch.float64)
    for _ in range(2):  # the second adds to the first
        folded(x).square().sum().backward()
        unit(x).square().sum().backward()
        assert unit.leaf.weight.grad is not None
        unit.leaf.deliver()
    for ours, theirs in zip(unit.factors.parameters(), folded.factors.parameters(), strict=True):
        assert theirs.grad.abs().max() > 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
        # A fused optimizer reads gradient and factor side by side as they lie in memory.
        assert ours.grad.stride() == ours.stride()
