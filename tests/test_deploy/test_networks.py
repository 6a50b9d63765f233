"""Networks of mmdet's and mmseg's zoos as files, and refused networks."""

import math

import numpy as np
import onnx
import pytest
import torch

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('onnxruntime')
from mmengine.config import Config
from mmengine.hub import get_config
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS

from mmexpand.deploy import ExportError, Int8, export_onnx, load_compact_model, onnxruntime_run
from mmexpand.deploy.decoding import predict
from mmexpand.deploy.graph import first_line
from mmexpand.deploy.network import RawOutputs
from mmexpand.deploy.program import export_program
from mmexpand.mm.models import build_compact_model
from tests.conftest import SEGMENTOR
from tests.test_deploy.networks import R18, STOCK, images, stock
from tests.test_mm.test_stock_networks import without_downloads


@pytest.mark.parametrize('name', STOCK, ids=lambda name: name.split('/')[-1].split('_')[0])
def test_predictions_are_the_frameworks_own(name, tmp_path):
    """The batch differs from the traced one, and the size where attention does not fix it."""
    # Attention reshapes to numbers that it has seen, and Swin's windows to padded ones.
    dynamic = not any(kind in name for kind in ('segformer', 'swin'))
    model = stock(name, STOCK[name])
    out = tmp_path / 'model.onnx'
    # Random weights amplify rounding from layer to layer, more than trained ones.
    report = export_onnx(model, images(1), out, tolerance=2e-3, dynamic_size=dynamic)
    assert report.agreement >= 0.999
    given = images(3, 96, 128, seed=1) if dynamic else images(3, seed=1)
    found = onnxruntime_run(out)(given.numpy())
    with torch.no_grad():
        expected = predict(model, given)
    if name.startswith('mmseg'):
        (classes,) = found
        expected = np.stack([e['classes'] for e in expected])
        assert classes.shape == (3, *given.shape[-2:])
        assert (classes == expected).mean() > 0.999
        assert len(np.unique(classes)) > 3
        return
    for index, image in enumerate(expected):
        boxes, scores, labels = (value[index] for value in found)
        count = min(len(image['scores']), len(scores))
        assert count > 10
        assert (labels >= 0).sum() == count
        np.testing.assert_allclose(scores[:count], image['scores'][:count], atol=1e-5)
        same = np.abs(boxes[:count] - image['boxes'].numpy()[:count]).max(-1) < 0.01
        assert (same & (labels[:count] == image['labels'].numpy()[:count])).mean() > 0.98


RETINANET = {
    'backbone.base_channels': 8,
    'neck.in_channels': [8, 16, 32, 64],
    'neck.out_channels': 16,
    'bbox_head.in_channels': 16,
    'bbox_head.feat_channels': 16,
    'bbox_head.num_classes': 5,
    'test_cfg.score_thr': 0.99999,
}


def test_an_image_without_detections(tmp_path):
    """Mmdet reshapes the boxes to (0, -1), which ONNX Runtime cannot."""
    model = stock('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', RETINANET)
    out = tmp_path / 'model.onnx'
    assert math.isnan(export_onnx(model, images(1), out, tolerance=2e-3).agreement)
    boxes, scores, labels = onnxruntime_run(out)(images(2).numpy())
    assert (labels == -1).all()
    assert not scores.any()
    assert not boxes.any()


OTHER_KINDS = [name for name in STOCK if 'rtmdet' in name or 'segformer' in name]


@pytest.mark.parametrize('name', OTHER_KINDS, ids=['rtmdet', 'segformer'])
def test_int8_and_programs_of_stock_networks(name, tmp_path):
    """That int8 computes is what is seen: what it costs, random weights do not tell."""
    model = stock(name, STOCK[name])
    calibration = [images(1, seed=seed) for seed in range(1, 4)]
    report = export_onnx(model, images(1), tmp_path / 'int8.onnx', int8=Int8(calibration), raw=True)
    assert 1e-4 < report.max_error < 1
    graph = onnx.load(tmp_path / 'int8.onnx').graph
    assert sum(node.op_type == 'QuantizeLinear' for node in graph.node) > 20
    given = images(2, seed=9)
    with torch.no_grad():
        expected = RawOutputs(model)(given)
    assert export_program(model, images(1), tmp_path / 'model.pt2', 1e-3) <= 1e-3
    found = torch.export.load(tmp_path / 'model.pt2').module()(given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('raw', [True, False])
def test_two_stages_are_refused(raw, tmp_path):
    name = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
    cfg = get_config(name)
    without_downloads(cfg._cfg_dict)
    cfg.merge_from_dict({'model.backbone.depth': 18, 'model.neck.in_channels': [64, 128, 256, 512]})
    model = build_compact_model(cfg)
    with pytest.raises(ExportError, match=r'^FasterRCNN has two stages, .* can be exported$'):
        export_onnx(model, images(1), tmp_path / 'model.onnx', raw=raw)
    assert list(tmp_path.iterdir()) == []


def test_what_the_exporter_fails_at_is_a_sentence(tmp_path, capfd, monkeypatch):
    """An operator that ONNX lacks: the exporter prints its graph."""
    model = stock('mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py', R18)
    extract = model.extract_feat
    monkeypatch.setattr(model, 'extract_feat', lambda x: extract(x + torch.special.i0(x)))
    (tmp_path / 'model.onnx').write_bytes(b'the old one')
    capfd.readouterr()
    with pytest.raises(ExportError, match=r'^EncoderDecoder cannot be .*i0') as e:
        export_onnx(model, images(1), tmp_path / 'model.onnx')
    assert '\n' not in str(e.value)
    assert capfd.readouterr().out == ''
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b'the old one']


def test_a_network_that_draws_random_numbers_is_refused(tmp_path, monkeypatch):
    """Such as SegNeXt's head, in eval mode too."""
    model = stock('mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py', R18)
    extract = model.extract_feat
    monkeypatch.setattr(model, 'extract_feat', lambda x: extract(x + torch.rand_like(x)))
    with pytest.raises(ExportError, match=r'^EncoderDecoder gives different outputs for the same'):
        export_onnx(model, images(1), tmp_path / 'model.onnx')
    assert list(tmp_path.iterdir()) == []


def test_an_operator_that_the_runtime_lacks_is_named_alone():
    error = RuntimeError(
        '[ONNXRuntimeError] : 1 : FAIL : Load model from /tmp/x/n.onnx failed:Fatal error: '
        'mmcv:MMCVDeformConv2d(-1) is not a registered function/op'
    )
    assert first_line(error) == (
        '[ONNXRuntimeError] : 1 : FAIL : mmcv:MMCVDeformConv2d(-1) is not a registered function/op'
    )


def test_a_model_whose_train_method_returns_nothing_is_loaded(tmp_path):
    """Such as mmdet's LD."""

    class Silent(EncoderDecoder):
        def train(self, mode=True):
            super().train(mode)

    MODELS.register_module(name='Silent', module=Silent, force=True)
    cfg = Config(dict(default_scope='mmseg', model=dict(SEGMENTOR, type='Silent')))
    model = build_compact_model(cfg)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    loaded = load_compact_model(cfg, tmp_path / 'w.pth')
    assert type(loaded) is Silent
    assert not loaded.training


def test_a_head_that_needs_more_than_images_is_refused(tmp_path, monkeypatch):
    """Such as Mask2Former's, which asks for the data samples."""
    model = stock('mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py', R18)
    forward = model.decode_head.forward
    monkeypatch.setattr(model.decode_head, 'forward', lambda x, samples: forward(x))
    with pytest.raises(ExportError, match=r'it does not run on images alone \(.*samples'):
        export_onnx(model, images(1), tmp_path / 'model.onnx')
    assert list(tmp_path.iterdir()) == []


def test_windows_and_other_suppression_are_refused(tmp_path):
    out = tmp_path / 'model.onnx'
    name = 'mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py'
    windows = {
        'test_cfg.mode': 'slide',
        'test_cfg.crop_size': (32, 32),
        'test_cfg.stride': (16, 16),
    }
    with pytest.raises(ExportError, match=r"'slide'.*model\.test_cfg\.mode=whole"):
        export_onnx(stock(name, {**R18, **windows}), images(1), out)
    name = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
    soft = {**STOCK[name], 'test_cfg.nms.type': 'soft_nms'}
    with pytest.raises(ExportError, match=r"test_cfg\.nms\.type is 'soft_nms'.*--raw"):
        export_onnx(stock(name, soft), images(1), out)
    assert list(tmp_path.iterdir()) == []
