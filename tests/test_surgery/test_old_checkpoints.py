"""Checkpoints of November 2026 load and contract to the weights they contracted to then."""

from pathlib import Path

import pytest
import torch
from torch import nn

import mmexpand
from mmexpand import ExpandConfig
from mmexpand.surgery.checkpoint import contract_state_dict

FOLDER = Path(__file__).parent / 'checkpoints'


@pytest.mark.parametrize('method', ['repvgg', 'cl'])
def test_old_checkpoints_contract_to_the_same_weights(method):
    saved = torch.load(FOLDER / f'{method}_2026-11.pth', weights_only=True)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
    )
    mmexpand.expand_(net, ExpandConfig(method, 2))
    net.load_state_dict(saved['expanded'])
    for compact in (mmexpand.contract(net).state_dict(), contract_state_dict(saved['expanded'])):
        assert compact.keys() == saved['compact'].keys()
        for name, value in saved['compact'].items():
            torch.testing.assert_close(compact[name], value, rtol=1e-5, atol=1e-6)
    if method == 'repvgg':
        # The floor counts here: a channel is next to dead.
        variance = saved['expanded']['3.repvgg.2.norm.running_var']
        assert variance.min() < 1e-3 * variance.mean()
