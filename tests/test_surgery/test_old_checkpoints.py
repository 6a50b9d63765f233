"""Checkpoints of November 2026 load and contract to the weights they contracted to then."""

from pathlib import Path

import pytest
import torch
from torch import nn

import mmexpand
from mmexpand import ExpandConfig
from mmexpand.mm.checkpoints import match_checkpoint, nonlinear_layers
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
    mmexpand.expand_(net, ExpandConfig(method, 2, init='default'))
    net.load_state_dict(saved['expanded'])
    for compact in (mmexpand.contract(net).state_dict(), contract_state_dict(saved['expanded'])):
        assert compact.keys() == saved['compact'].keys()
        for name, value in saved['compact'].items():
            torch.testing.assert_close(compact[name], value, rtol=1e-5, atol=1e-6)
    if method == 'repvgg':
        # The floor counts here: a channel is next to dead.
        variance = saved['expanded']['3.repvgg.2.norm.running_var']
        assert variance.min() < 1e-3 * variance.mean()


OLD_NAMES = {
    'cl_shortcut': dict(method='cl', shortcut=True),
    'repvgg_cl': dict(method='repvgg', main='cl'),
    'bn': dict(method='bn'),
}


def former_keys(state_dict, old):
    """Write the keys as before 2026-12: options in the name, the norm of 'bn' inside of a sum."""
    method = OLD_NAMES[old]['method']
    result = {}
    for key, value in state_dict.items():
        if key.endswith('expanded_site'):
            value = torch.cat((value[:-1], value.new_ones(1)))
        elif old == 'bn':
            key = key.replace('.bn.', '.bn.0.')
        result[key.replace(f'.{method}.', f'.{old}.')] = value
    return result


@pytest.mark.parametrize('old', OLD_NAMES)
def test_keys_of_former_names_load(old):
    how = OLD_NAMES[old]

    def network():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
        mmexpand.expand_(net.double(), ExpandConfig(rate=2, **how))
        return net

    trained = network()
    for value in trained.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 2)
    former = former_keys(trained.state_dict(), old)
    assert former.keys() != trained.state_dict().keys()
    compact = mmexpand.contract(trained).state_dict()
    checkpoint = dict(state_dict=dict(former))
    net = network()
    assert not torch.equal(mmexpand.contract(net)[0].weight, compact['0.weight'])
    match_checkpoint(net, checkpoint, training=True, resume=True)
    net.load_state_dict(former)
    other = network()
    other.load_state_dict(checkpoint['state_dict'])
    for found in (net, other):
        for key, value in trained.state_dict().items():
            assert torch.equal(found.state_dict()[key], value), key
    found = contract_state_dict(former)
    assert list(found) == list(compact)
    for key, value in compact.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12)


def test_layers_of_former_nonlinear_checkpoints_are_known():
    layers = dict(
        a=dict(method='cl_relu'), b=dict(method='cl'), c=dict(method='ck', nonlinear='relu')
    )
    assert nonlinear_layers(dict(meta=dict(mmexpand=dict(layers=layers)))) == {'a', 'c'}
