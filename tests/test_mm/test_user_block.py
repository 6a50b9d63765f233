"""A block in a user's own module, added as CONTRIBUTING says: plan, training, files, drawing."""

import copy
import sys

import pytest
import torch
from torch import nn

import mmexpand
from mmexpand import ExpandConfig, register_block
from mmexpand.analysis.drawing import draw_block
from mmexpand.core.batch_sample import BatchSample
from mmexpand.core.blocks import BLOCKS
from mmexpand.core.expression import Chain, Norm, Sum
from mmexpand.mm.launch import build_runner
from mmexpand.surgery.checkpoint import contract_state_dict, load_checkpoint

MODULE = '''
from mmexpand import register_block
from mmexpand.core.expression import Scale, Sum


def twins(spec):
    """W = 0.5 W_1 + 0.5 W_2."""
    branches = [Scale(spec.conv(spec.bias), 0.5) for _ in range(2)]
    return Sum(branches, spec.padding, spec.dilation)


register_block('twins', twins, lambda spec: 'it has groups' if spec.groups > 1 else '')
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / 'my_blocks.py').write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield 'my_blocks'
    BLOCKS.pop('twins', None)
    sys.modules.pop('my_blocks', None)


def test_a_registered_block_trains_and_contracts(seg_cfg, module):
    cfg = seg_cfg(
        custom_imports=dict(imports=['mmexpand', module], allow_failed_imports=False),
        custom_hooks=[
            dict(type='ExpandHook', include='backbone', method='twins'),
            dict(type='ContractHook'),
        ],
    )
    __import__(module)  # As Config.fromfile does for custom_imports.
    build_runner(cfg, ('train', 'val')).train()
    expanded = load_checkpoint(f'{cfg.work_dir}/iter_4.pth')['state_dict']
    compact = load_checkpoint(f'{cfg.work_dir}/compact_last.pth')['state_dict']
    assert any('.twins.' in key for key in expanded)
    found = contract_state_dict(expanded)
    for name, value in compact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_registered_block_is_planned_and_drawn(module):
    __import__(module)
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    plan = mmexpand.plan(net, ExpandConfig('twins'))
    assert [layer.method for layer in plan] == ['twins']
    assert plan.skipped[0].reason.endswith('it has groups')
    drawing = draw_block('twins')
    assert drawing.count('class="factor" width') == drawing.count('class="scale" width') == 2


@pytest.mark.parametrize('name', ['cl', 'auto', 'forward', 'two words'])
def test_names_that_cannot_be(name):
    with pytest.raises(ValueError, match=name):
        register_block(name, lambda spec: spec.conv())


def test_a_block_that_cannot_be_set_to_a_kernel_is_refused_in_words():
    """With the function of the model kept, which is the default of ``expand_``."""
    register_block(
        'pair',
        lambda spec: Sum(
            [Chain([spec.conv(), spec.factor(8, 8)], spec.groups)], spec.padding, spec.dilation
        ),
    )
    try:
        net = nn.Sequential(nn.Conv2d(4, 8, 3))
        with pytest.raises(ValueError, match=r"a Chain cannot be set.*init='default'"):
            mmexpand.expand_(net, method='pair')
        mmexpand.expand_(net, method='pair', init='default')
        assert net(torch.ones(1, 4, 5, 5)).shape == (1, 8, 3, 3)
        state_dict = net.state_dict()
    finally:
        BLOCKS.pop('pair')
    with pytest.raises(ValueError, match="block 'pair' is not registered; import the module"):
        contract_state_dict(state_dict)


def test_norms_of_several_kinds_in_a_block_fold_as_each_does():
    """One floor or eps must not stand for all."""

    def mixed(spec):
        norms = [Norm(spec.conv(), True, floored=floored) for floored in (False, True)]
        norms[1].norm.eps = 1e-2
        return Sum(norms, spec.padding, spec.dilation)

    register_block('mixed', mixed, normed=True)
    try:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(4, 8, 3)).double()
        mmexpand.expand_(net, method='mixed', init='default', forward='folded')
        folded, branches = copy.deepcopy(net)[0], copy.deepcopy(net)[0]
        x = torch.randn(2, 4, 30, 30, dtype=torch.float64)
        sample = BatchSample(x, folded.spec, 10**9)  # All pixels.
        kernel, bias = folded.fold(sample)
        expected = branches.forward_layerwise(x)
        torch.testing.assert_close(nn.functional.conv2d(x, kernel, bias), expected)
    finally:
        BLOCKS.pop('mixed')
