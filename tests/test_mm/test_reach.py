"""Every expanded layer of stock networks is verified, whatever their tensor mode leaves out."""

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from mmengine.structures import PixelData
from mmseg.models.decode_heads import FCNHead
from mmseg.structures import SegDataSample
from torch import nn

import mmexpand
from mmexpand import ExpandConfig
from mmexpand.mm.contraction import contract_and_verify, contract_without_data, report_lines
from mmexpand.mm.models import build_compact_model
from mmexpand.surgery import VerificationError, named_units
from mmexpand.surgery.copying import copy_model
from tests.test_mm.test_stock_networks import without_downloads

CAPTURED, IN_MODEL, RANDOM = 'on captured input', 'in the model', 'on random input'


def resnet18(cfg, channels=(64, 128, 256, 512)):
    cfg.model.backbone.depth = 18
    if 'neck' in cfg.model:
        cfg.model.neck.update(in_channels=list(channels), out_channels=16)
    if 'roi_head' in cfg.model:
        cfg.model.rpn_head.update(in_channels=16, feat_channels=16)
        head = cfg.model.roi_head
        head.bbox_roi_extractor.out_channels = head.mask_roi_extractor.out_channels = 16
        head.bbox_head.update(in_channels=16, fc_out_channels=32)
        head.mask_head.update(in_channels=16, conv_out_channels=16)


def build(name, small=resnet18):
    torch.manual_seed(0)
    cfg = get_config(name)
    without_downloads(cfg._cfg_dict)
    small(cfg)
    init_default_scope(name.split('::')[0])
    model = build_compact_model(cfg)
    model.init_weights()
    return model


def detection_batch(masks=False):
    return demo_mm_inputs(2, [[3, 64, 64], [3, 64, 64]], num_classes=20, with_mask=masks)


def segmentation_batch(classes=19):
    samples = []
    for _ in range(2):
        labels = torch.randint(0, classes, (1, 64, 64))
        shape = dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64))
        samples.append(SegDataSample(metainfo=shape, gt_sem_seg=PixelData(data=labels)))
    return dict(inputs=[torch.randint(0, 256, (3, 64, 64)).byte()] * 2, data_samples=samples)


@pytest.fixture(scope='module')
def mask_rcnn():
    return build('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')


@pytest.mark.parametrize(
    ('include', 'kinds'),
    [
        (['roi_head'], {CAPTURED}),
        (['neck', 'roi_head'], {IN_MODEL, CAPTURED}),
        (['rpn_head'], {CAPTURED}),
    ],
)
def test_two_stage_detectors(mask_rcnn, include, kinds):
    model = copy_model(mask_rcnn)
    mmexpand.expand_(model, ExpandConfig('cl+fc', 1, include=include))
    batch = detection_batch(masks=True)
    result = contract_and_verify(model, batch)
    assert result.compared == 'features'
    assert list(result.verification.layers) == list(result.verification.how)
    assert set(result.verification.layers) == set(named_units(model))
    assert set(result.verification.how.values()) == kinds
    assert min(result.verification.layers.values()) > 0
    assert result.verification.max_error < 1e-4


def test_without_data_a_head_is_verified_on_random_input(mask_rcnn):
    model = copy_model(mask_rcnn)
    mmexpand.expand_(model, ExpandConfig('cl+fc', 1, include=['neck', 'roi_head']))
    result = contract_without_data(model, 64, 64)
    assert result.compared == 'features'
    for name, how in result.verification.how.items():
        assert how == (IN_MODEL if name.startswith('neck') else RANDOM), name
    assert set(result.verification.layers) == set(named_units(model))


def test_a_wrong_layer_that_the_tensor_mode_leaves_out_is_found(mask_rcnn, monkeypatch):
    model = copy_model(mask_rcnn)
    mmexpand.expand_(model, ExpandConfig(method='cl', rate=1, include='rpn_head'))
    unit = named_units(model)['rpn_head.rpn_reg']
    right = type(unit).to_conv

    def wrong(self):
        conv = right(self)
        if conv.out_channels == unit.out_channels:
            conv.weight.data += 1
        return conv

    monkeypatch.setattr(type(unit), 'to_conv', wrong)
    with pytest.raises(VerificationError, match=r'1 of 3 .*rpn_reg .*on captured input'):
        contract_and_verify(model, detection_batch(masks=True))


AUXILIARY = 'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'


def small_pspnet(cfg):
    cfg.model.backbone.update(depth=18, norm_cfg=dict(type='BN'))
    cfg.model.decode_head.update(in_channels=512, channels=8, norm_cfg=dict(type='BN'))
    cfg.model.auxiliary_head.update(in_channels=256, channels=8, norm_cfg=dict(type='BN'))
    cfg.model.data_preprocessor.size = (64, 64)


def test_auxiliary_heads():
    model = build(AUXILIARY, small_pspnet)
    mmexpand.expand_(
        model, ExpandConfig(method='cl', rate=1, include=['decode_head', 'auxiliary_head'])
    )
    result = contract_and_verify(model, segmentation_batch())
    assert result.compared == 'outputs'
    assert set(result.verification.layers) == set(named_units(model))
    for name, how in result.verification.how.items():
        assert how == (CAPTURED if name.startswith('auxiliary_head') else IN_MODEL), name
    assert result.verification.max_error < 1e-4


def test_layers_without_any_ground_truth_are_verified_on_random_input():
    model = build(AUXILIARY, small_pspnet)
    mmexpand.expand_(model, ExpandConfig(method='cl', rate=1, include='auxiliary_head'))
    batch = segmentation_batch()
    for sample in batch['data_samples']:
        del sample.gt_sem_seg
    how = contract_and_verify(model, batch).verification.how
    assert how
    assert set(how.values()) == {RANDOM}


def test_activation_checkpointing():
    model = build(AUXILIARY, small_pspnet)
    # Residual branches start at zero: what is in them would not show.
    nn.init.ones_(model.backbone.layer1[0].bn2.weight)
    mmexpand.expand_(model, ExpandConfig(method='cl', rate=1, include='backbone.layer1'))
    turn_on_activation_checkpointing(model, ['backbone.layer1', 'backbone.layer1.0.conv1'])
    batch = segmentation_batch()
    result = contract_and_verify(model, batch)
    assert set(result.verification.layers) == set(named_units(model))
    assert set(result.verification.how.values()) == {IN_MODEL}
    # The compact model is evaluated with its own weights, and not with the original's.
    inputs = model.data_preprocessor(batch)['inputs']
    compact = result.compact.eval()
    before = compact(inputs)
    with torch.no_grad():
        compact.backbone.layer1[0].conv1.weight.zero_()
        assert not torch.equal(compact(inputs), before)
        assert torch.allclose(model.eval()(inputs), before, rtol=1e-3, atol=1e-4)


class SampleHead(FCNHead):
    """As heads of mask classification do: nothing is computed without data samples."""

    def forward(self, inputs, data_samples):
        return super().forward(inputs) * len(data_samples)

    def loss(self, inputs, data_samples, train_cfg):
        return self.loss_by_feat(self.forward(inputs, data_samples), data_samples)

    def predict(self, inputs, batch_img_metas, test_cfg):
        return self.predict_by_feat(self.forward(inputs, batch_img_metas), batch_img_metas)


def test_a_head_that_needs_data_samples():
    model = build(AUXILIARY, small_pspnet)
    head = SampleHead(in_channels=512, channels=8, num_classes=19, in_index=3, num_convs=1)
    model.decode_head = head
    mmexpand.expand_(
        model, ExpandConfig(method='cl', rate=1, include=['backbone.layer4', 'decode_head'])
    )
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmexpand.mm.contraction.log', lines.append)
        result = contract_and_verify(model, segmentation_batch())
    assert result.compared == 'features'
    assert any('compares the features' in line and 'data_samples' in line for line in lines)
    assert 'end to end (features)' in report_lines('compact_last.pth', result)[0]
    for name, how in result.verification.how.items():
        assert how == (CAPTURED if name.startswith('decode_head') else IN_MODEL), name
    assert set(result.verification.layers) == set(named_units(model))


def test_the_report_lists_every_layer():
    model = build(AUXILIARY, small_pspnet)
    mmexpand.expand_(model, ExpandConfig(method='cl', rate=1, include='backbone'))
    result = contract_and_verify(model, segmentation_batch())
    text = '\n'.join(report_lines('compact_last.pth', result))
    assert len(result.layers) > 15
    assert all(f'{name}: ' in text for name in named_units(model))
