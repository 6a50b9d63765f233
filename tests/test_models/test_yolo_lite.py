import math

import pytest
import torch

pytest.importorskip('mmdet')
from mmdet.registry import MODELS

from mmexpand.models import YOLOLite


def detector(num_classes=20):
    return MODELS.build(
        dict(
            type='mmdet.SingleStageDetector',
            backbone=dict(type='YOLOLite'),
            bbox_head=dict(type='YOLOV2Head', num_classes=num_classes, in_channels=128),
        )
    )


@pytest.mark.parametrize('size', [(224, 224), (160, 320)])
def test_stride_is_32(size):
    (feature,) = YOLOLite()(torch.rand(2, 3, *size))
    assert feature.shape == (2, 128, size[0] // 32, size[1] // 32)


def test_channels_are_arguments():
    backbone = YOLOLite(in_channels=1, channels=(4, 6))
    (feature,) = backbone(torch.rand(1, 1, 8, 8))
    assert feature.shape == (1, 6, 2, 2)


def test_layers_are_3x3_with_bias_and_without_norm():
    backbone = YOLOLite()
    assert [m.conv.out_channels for m in backbone.convs] == [16, 32, 64, 128, 128]
    for module in backbone.convs:
        assert module.conv.kernel_size == (3, 3)
        assert module.conv.bias is not None
        assert not module.with_norm
        assert module.activate.negative_slope == 0.1


def test_norms_are_behind_convolutions_without_bias():
    backbone = YOLOLite(norm_cfg=dict(type='BN'))
    for module in backbone.convs:
        assert isinstance(module.norm, torch.nn.BatchNorm2d)
        assert module.conv.bias is None


def test_parameter_count_is_that_of_the_published_weights():
    assert sum(p.numel() for p in detector().parameters()) == 572_317
    assert len(detector().state_dict()) == 2 * 7


def test_initialisation_is_kaimings_by_fan_in():
    torch.manual_seed(0)
    model = detector()
    model.init_weights()
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 7
    for conv in convs:
        fan_in = conv.weight[0].numel()
        expected = math.sqrt(2 / (1 + 0.1**2) / fan_in)
        # 432 values in the smallest layer: the sample deviation is within 10 %.
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert torch.equal(conv.bias, torch.zeros_like(conv.bias))


def test_raw_forward_gives_one_map():
    model = detector(num_classes=3)
    (pred_map,) = model(torch.rand(1, 3, 64, 96), mode='tensor')
    assert pred_map.shape == (1, 5 * (5 + 3), 2, 3)
