"""Stock OpenMMLab networks, every eligible layer expanded: shared heads, depthwise, attention."""

import pytest
import torch
from mmengine.hub import get_config
from torch import nn

import mmexpand
from mmexpand import ExpandConfig
from mmexpand.mm.models import build_compact_model, tensor_outputs

NETWORKS = [
    ('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', 'cl'),
    ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', 'cl'),
    ('mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py', 'cl'),
    ('mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py', 'cl'),
    ('mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py', 'cl+fc'),
    ('mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py', 'auto'),
]


def without_downloads(node):
    """Drop pretrained weights, which no test may fetch."""
    if isinstance(node, dict):
        for key in ('init_cfg', 'pretrained'):
            if key in node and 'Pretrained' in str(node[key]) + key.title():
                node[key] = None
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            without_downloads(value)


@pytest.mark.parametrize(('name', 'method'), NETWORKS)
def test_expands_and_contracts_exactly(name, method):
    torch.manual_seed(0)
    cfg = get_config(name)
    without_downloads(cfg._cfg_dict)
    model = build_compact_model(cfg).double()
    keys = list(model.state_dict())
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    transposed = {n for n, m in model.named_modules() if isinstance(m, nn.ConvTranspose2d)}
    plan = mmexpand.expand_(model, ExpandConfig(method, 1.5, init='default'))
    assert len(plan) > 30
    assert transposed <= {layer.name for layer in plan}
    assert bool(transposed) == ('centernet' in name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    compact = mmexpand.contract(model)
    assert list(compact.state_dict()) == keys
    assert {name for name, p in compact.named_parameters() if not p.requires_grad} == frozen
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    report = mmexpand.verify(model, compact, lambda m: tensor_outputs(m, dict(inputs=images)))
    assert 0 < report.max_error < 1e-12
