"""A block in a user's own module, added as CONTRIBUTING says: plan, training, files, drawing."""

import sys

import pytest
import torch
from torch import nn

import mmexpand
from mmexpand import ExpandConfig, register_block
from mmexpand.analysis.drawing import draw_block
from mmexpand.core.blocks import BLOCKS
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
