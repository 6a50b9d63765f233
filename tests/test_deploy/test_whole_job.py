"""Files that take pixels and give predictions; int8; other formats; the tool that makes them."""

import re

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('onnxruntime')
import onnx
from mmdet.apis import inference_detector
from mmdet.registry import MODELS as DETECTORS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dataset import Compose
from mmseg.apis import inference_model
from torch import nn

from mmexpand.deploy import (
    ExportError,
    FileModel,
    Int8,
    Pixels,
    compare_file,
    export_onnx,
    export_program,
    onnxruntime_run,
    preprocess,
    table,
)
from mmexpand.mm.models import build_compact_model, build_expanded_model
from tests.conftest import small_config
from tests.test_deploy.networks import images, randomise
from tests.test_deploy.test_onnx import UNET, YOLO, small
from tests.tools_in_process import load, run


@pytest.fixture(params=[YOLO, UNET], ids=['yolo-lite', 'unet'])
def network(request):
    """A config and its compact network."""
    cfg = small(request.param)
    torch.manual_seed(0)
    return cfg, randomise(build_compact_model(cfg))


def stock_inference(cfg, model, picture):
    """Return the result of mmdet's or mmseg's own function, in pixels of the file's input."""
    model.cfg, model.dataset_meta = cfg.copy(), {}
    pipeline = cfg.test_dataloader.dataset.pipeline
    model.cfg.test_pipeline = pipeline
    if hasattr(model, 'decode_head'):
        return inference_model(model, str(picture)).pred_sem_seg.data[0].numpy()
    steps = Compose([step for step in pipeline if step.type != 'LoadAnnotations'])
    found = inference_detector(model, str(picture), test_pipeline=steps)
    scale = torch.tensor(found.scale_factor).repeat(2)
    return found.pred_instances.bboxes * scale, found.pred_instances.scores


@pytest.mark.parametrize(('order', 'uint8'), [('bgr', False), ('rgb', True)])
def test_pixels_in_predictions_out(network, picture, tmp_path, order, uint8):
    """Against the stock functions, which read the picture themselves."""
    cfg, model = network
    out = tmp_path / 'model.onnx'
    pixels = Pixels(model.data_preprocessor, order, uint8)
    export_onnx(model, preprocess(model, cfg, picture), out, pixels=pixels)
    image = cv2.imread(str(picture))
    if 'decode_head' in cfg.model:
        # The padding that mmseg adds after normalisation is what becomes 0.
        mean = [*reversed(cfg.model.data_preprocessor.mean)]
        image = cv2.copyMakeBorder(
            image.astype(np.float32), 0, 10, 0, 6, cv2.BORDER_CONSTANT, value=mean
        )
        image = image.round() if uint8 else image
    else:
        image = cv2.resize(image, (96, 64))
    image = image[..., ::-1] if order == 'rgb' else image
    batch = np.ascontiguousarray(image.transpose(2, 0, 1)[None])
    found = onnxruntime_run(out)(batch.astype(np.uint8 if uint8 else np.float32))
    expected = stock_inference(cfg, model, picture)
    if 'decode_head' in cfg.model:
        # Bytes cannot hold the mean that the padding is: the random network sees it at the border.
        assert (found[0][0, :70, :90] == expected).mean() > (0.97 if uint8 else 0.9999)
    else:
        boxes, scores = expected
        count = (found[2][0] >= 0).sum()
        assert count == len(scores) > 10
        np.testing.assert_allclose(found[1][0][:count], scores, atol=1e-5)
        assert (np.abs(found[0][0][:count] - boxes.numpy()).max(1) < 0.01).mean() > 0.98


@pytest.mark.parametrize('order', ['bgr', 'rgb'])
def test_pixels_of_a_classifier(tmp_path, order):
    """mmpretrain's preprocessor has names of its own, and labels or none."""
    model = dict(
        type='ImageClassifier',
        data_preprocessor=dict(mean=[120] * 3, std=[60, 50, 40], to_rgb=True),
        backbone=dict(type='ResNet', depth=18),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=5, in_channels=512),
    )
    model = build_compact_model(Config(dict(default_scope='mmpretrain', model=model))).eval()
    out = tmp_path / 'model.onnx'
    pixels = Pixels(model.data_preprocessor, order)
    export_onnx(model, images(1), out, raw=True, pixels=pixels)
    given = torch.randint(0, 256, (2, 3, 64, 96)).float()
    bgr = given if order == 'bgr' else given.flip(1)
    with torch.no_grad():
        expected = model(model.data_preprocessor(dict(inputs=bgr))['inputs'], mode='tensor')
    (found,) = onnxruntime_run(out)(given.numpy())
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_wrong_channel_order_is_noticed(network, picture, tmp_path):
    cfg, model = network
    pixels = Pixels(model.data_preprocessor, 'bgr')
    pixels.flips = not pixels.flips
    with pytest.raises(RuntimeError, match=r'differ by .*was not written'):
        export_onnx(model, preprocess(model, cfg, picture), tmp_path / 'x.onnx', pixels=pixels)
    assert list(tmp_path.iterdir()) == []


def test_decoding_of_other_boxes_is_refused(tmp_path, monkeypatch):
    model = randomise(build_compact_model(small(YOLO)))
    decode = model.bbox_head.predict_by_feat

    def shifted(*args, cfg=None, **kwargs):
        found = decode(*args, cfg=cfg, **kwargs)
        if cfg is not None:  # only while the file is made
            found[0].bboxes = found[0].bboxes + 1
        return found

    monkeypatch.setattr(model.bbox_head, 'predict_by_feat', shifted)
    with pytest.raises(RuntimeError, match=r'^only 0\.00% of the predictions .* was not written$'):
        export_onnx(model, images(1), tmp_path / 'x.onnx')
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_takes_one_image_only_is_a_sentence(network, tmp_path, monkeypatch):
    _, model = network

    def of_one(path):
        run = onnxruntime_run(path)

        def run_one(given):
            if len(given) > 1:
                raise RuntimeError('Got: 2 Expected: 1')
            return run(given)

        return run_one

    monkeypatch.setattr('mmexpand.deploy.onnx.onnxruntime_run', of_one)
    said = r'cannot be exported to ONNX: the graph fails on images of shape \(2, .*Expected: 1'
    with pytest.raises(ExportError, match=said):
        export_onnx(model, images(1), tmp_path / 'x.onnx', raw=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('after', 'raw', 'words'),
    [(0, True, 'does not take the graph'), (1, False, 'its decoding fails')],
)
def test_what_onnx_runtime_refuses_is_a_sentence(network, tmp_path, monkeypatch, after, raw, words):
    calls = []

    def refuse(path):
        calls.append(path)
        if len(calls) > after:
            raise RuntimeError('Deform is not a registered op')
        return onnxruntime_run(path)

    monkeypatch.setattr('mmexpand.deploy.onnx.onnxruntime_run', refuse)
    with pytest.raises(ExportError, match=f'cannot be exported to ONNX: .*{words} .*Deform'):
        export_onnx(network[1], images(1), tmp_path / 'x.onnx', raw=raw)
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_models_that_have_no_metrics():
    """CocoMetric gives none where nothing was detected."""
    rows = {'PyTorch': {}, 'float32': {'mAP': 0.5, 'names': 'a'}, 'int8': {}}
    assert table(rows, dict.fromkeys(rows, 1e6)).splitlines() == [
        '|  | mAP | MB |',
        '| --- | --- | --- |',
        '| PyTorch | - | 1.00 |',
        '| float32 | 0.5 | 1.00 |',
        '| int8 | - | 1.00 |',
    ]


def classifier(tmp_path, **changes):
    """A config file of a classifier, its checkpoint, and an image."""
    model = dict(
        type='ImageClassifier',
        backbone=dict(type='ResNet', depth=18),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=5, in_channels=512),
    )
    steps = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=64), dict(type='PackInputs')]
    loader = dict(
        batch_size=1, num_workers=0, dataset=dict(type='CustomDataset', pipeline=steps, **changes)
    )
    preprocessor = dict(mean=[120] * 3, std=[60] * 3)
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=model,
            data_preprocessor=preprocessor,
            test_dataloader=loader,
            test_evaluator=dict(type='Accuracy'),
            test_cfg=dict(),
        )
    )
    cfg.dump(tmp_path / 'config.py')
    model = build_compact_model(cfg)
    torch.save(dict(meta={}, state_dict=model.state_dict()), tmp_path / 'net.pth')
    return tmp_path / 'config.py', tmp_path / 'net.pth'


def test_the_tool_with_a_classifier(picture, tmp_path, monkeypatch, capsys):
    pytest.importorskip('mmpretrain')
    tool = load('export_onnx.py')
    monkeypatch.setattr(tool, 'find_spec', lambda name: name == 'openvino')
    monkeypatch.setattr(tool, 'openvino_run', onnxruntime_run)
    out = tmp_path / 'out/net.onnx'
    command = [*classifier(tmp_path), '--out', out, '--image', picture]
    status, message = run('export_onnx.py', *command, '--evaluate')
    assert status == 1
    assert 'the file of a ImageClassifier gives its raw outputs' in message
    assert list(out.parent.iterdir()) == []
    assert run('export_onnx.py', *command) == (0, '')
    assert re.search(r'in OpenVINO: largest error \d', capsys.readouterr().out)
    option = 'test_dataloader.dataset.pipeline=[]'
    status, message = run('export_onnx.py', *command, '--cfg-options', option)
    assert status == 1
    assert 'CustomDataset, of test_dataloader, has no pipeline to load an image with' in message


def test_int8_is_int8_and_near(network, tmp_path):
    _, model = network
    out = tmp_path / 'int8.onnx'
    given = [images(1, seed=seed) for seed in range(1, 6)]
    report = export_onnx(model, images(1), out, int8=Int8(given), raw=True)
    assert 1e-4 < report.max_error < 0.3
    graph = onnx.load(out).graph
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
    by_output = {node.output[0]: node for node in graph.node}
    convs = [node for node in graph.node if node.op_type == 'Conv']
    assert len(convs) >= 7
    for conv in convs:
        assert weights[by_output[conv.input[1]].input[0]] == onnx.TensorProto.INT8
    # Two images at once, too.
    assert onnxruntime_run(out)(images(2).numpy())[0].shape[0] == 2


def test_program(network, tmp_path):
    _, model = network
    out = tmp_path / 'model.pt2'
    pixels = Pixels(model.data_preprocessor, 'rgb', uint8=True)
    assert export_program(model, images(1), out, 1e-4, pixels=pixels) <= 1e-4
    given = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    (found,) = torch.export.load(out).module()(given)
    inputs = model.data_preprocessor(dict(inputs=[*given.flip(1)], data_samples=[]), False)
    with torch.no_grad():
        expected = model(inputs['inputs'], mode='tensor')
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_torch_export_fails_at_is_a_sentence(tmp_path, monkeypatch):
    model = randomise(build_compact_model(small(YOLO)))
    forward = model.backbone.forward
    monkeypatch.setattr(model.backbone, 'forward', lambda x: forward(x * float(x.mean() > 0)))
    with pytest.raises(
        ExportError, match=r'cannot be exported by torch\.export: .*not written$'
    ) as e:
        export_program(model, images(1), tmp_path / 'model.pt2', 1e-4)
    assert '\n' not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_ncnn(network, tmp_path):
    ncnn = pytest.importorskip('ncnn')
    pytest.importorskip('pnnx')
    from mmexpand.deploy import export_ncnn

    _, model = network
    out = tmp_path / 'model.param'
    pixels = Pixels(model.data_preprocessor, 'rgb')
    assert export_ncnn(model, images(1), out, 1e-4, pixels=pixels) <= 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {'model.param', 'model.bin'}
    given = 255 * torch.rand(3, 64, 96)
    net = ncnn.Net()
    assert (net.load_param(str(out)), net.load_model(str(tmp_path / 'model.bin'))) == (0, 0)
    extractor = net.create_extractor()
    extractor.input('in0', ncnn.Mat(given.numpy()).clone())
    found = torch.tensor(np.array(extractor.extract('out0')[1]))
    inputs = model.data_preprocessor(dict(inputs=[given.flip(0)], data_samples=[]), False)
    with torch.no_grad():
        expected = model(inputs['inputs'], mode='tensor')
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert (found - expected[0]).abs().max() < 1e-4 * expected.abs().max()


def test_what_pnnx_fails_at_is_a_sentence(tmp_path, monkeypatch):
    pytest.importorskip('pnnx')
    from mmexpand.deploy import export_ncnn

    model = randomise(build_compact_model(small(YOLO)))
    forward = model.backbone.forward
    monkeypatch.setattr(model.backbone, 'forward', lambda x: forward(x.long().float().cumprod(1)))
    with pytest.raises((ExportError, RuntimeError), match=r'ncnn') as e:
        export_ncnn(model, images(1), tmp_path / 'model.param', 1e-4)
    assert '\n' not in str(e.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('raw', [True, False])
def test_openvino_computes_the_same(network, tmp_path, raw):
    pytest.importorskip('openvino')
    from mmexpand.deploy import openvino_run

    _, model = network
    out = tmp_path / 'model.onnx'
    export_onnx(model, images(1), out, raw=raw)
    found = compare_file(openvino_run(out), model, images(1), raw=raw)
    assert found < 1e-4 if raw else found > 0.99


def test_a_size_that_the_file_does_not_take_is_named():
    model = build_compact_model(small(UNET)).eval()
    file = FileModel(model, None, ('classes',), size=(64, 96))
    data = dict(inputs=[torch.zeros(3, 32, 48, dtype=torch.uint8)], data_samples=[])
    with pytest.raises(ValueError, match=r'takes images of 64x96, .* 32x48: .*--dynamic-size'):
        file.val_step(data)


def test_logits_resized_before_the_arg_max_are_pytorchs_own(picture, tmp_path):
    """The pipeline makes the picture smaller, and pads it."""
    cfg = small(UNET)
    cfg.merge_from_dict({'test_dataloader.dataset.pipeline.1.scale': (60, 48)})
    torch.manual_seed(0)
    model = randomise(build_compact_model(cfg))
    inputs = preprocess(model, cfg, picture)
    steps = [s for s in cfg.test_dataloader.dataset.pipeline if s.type != 'LoadAnnotations']
    sample = Compose(steps)(dict(img_path=str(picture), img_id=0))

    def classes(network):
        data = dict(inputs=[sample['inputs']], data_samples=[sample['data_samples'].clone()])
        with torch.no_grad():
            return network.val_step(data)[0].pred_sem_seg.data

    expected, found = classes(model), {}
    assert expected.shape == (1, 70, 90)
    for logits in (True, False):
        report = export_onnx(model, inputs, tmp_path / 'x.onnx', logits=logits)
        assert report.agreement > 0.999
        run = onnxruntime_run(report.path)
        found[logits] = classes(FileModel(model, run, tuple(report.output_shapes)))
    assert tuple(report.output_shapes) == ('classes',)
    # Rounding alone may turn near ties.
    assert (found[True] == expected).float().mean() > 0.9995
    assert 0.5 < (found[False] == expected).float().mean() < 0.999


def test_the_tool_does_the_whole_job(street, tmp_path, capsys):
    cfg = small_config(street, tmp_path / 'work_dir')
    torch.manual_seed(0)
    model = randomise(build_expanded_model(cfg))
    torch.save(dict(meta={}, state_dict=model.state_dict()), tmp_path / 'expanded.pth')
    cfg.dump(tmp_path / 'config.py')
    picture = next(street.glob('leftImg8bit/train/town/*.png'))
    (tmp_path / 'out').mkdir()
    files = [tmp_path / 'config.py', tmp_path / 'expanded.pth', '--out', tmp_path / 'out/net.onnx']
    options = ['--preprocess', 'bgr', '--uint8', '--pt2', '--evaluate', '--logits']
    options += ['--int8', '3', '--int8-keep', 'auto', 'decode_head.conv_seg', '--int8-drop', '1']
    assert run('export_onnx.py', *files, '--image', picture, *options) == (0, '')
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {
        'net.onnx',
        'net_int8.onnx',
        'net.pt2',
    }
    text = capsys.readouterr().out
    scores = dict(re.findall(r'^\| (\w[^|]*) \| [\d.]+ \| ([\d.]+) ', text, re.MULTILINE))
    assert {'PyTorch', 'ONNX Runtime, float32', 'ONNX Runtime, int8'} <= set(scores)
    assert scores['PyTorch'] == scores['ONNX Runtime, float32']
    assert abs(float(scores['ONNX Runtime, int8']) - float(scores['PyTorch'])) < 1


def test_options_that_do_not_fit_together(capsys):
    base = ['c.py', 'x.pth', '--out', 'x.onnx', '--image', 'x.png']
    for options, words in (
        (['--uint8'], 'add --preprocess'),
        (['--preprocess', 'bgr', '--uint8', '--ncnn'], 'leave out --uint8'),
        (['--raw', '--evaluate'], 'leave out --raw'),
    ):
        assert run('export_onnx.py', *base, *options)[0] == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ('head', 'clips'),
    [
        (dict(type='YOLOXHead', num_classes=1, in_channels=4, feat_channels=4), False),
        (dict(type='RetinaHead', num_classes=1, in_channels=4), True),
        (dict(type='YOLOV2Head', num_classes=1, in_channels=4), True),
    ],
    ids=lambda value: value['type'] if isinstance(value, dict) else '',
)
def test_boxes_of_a_file_are_clipped_if_the_head_clips(head, clips):
    model = nn.Module()
    model.data_preprocessor = lambda data, training: data
    model.bbox_head = DETECTORS.build(head)
    boxes = np.array([[[-8, 2, 20, 70]]], np.float32)
    outputs = boxes, np.ones((1, 1), np.float32), np.zeros((1, 1), np.int64)
    file = FileModel(model, lambda images: outputs, ('boxes', 'scores', 'labels'))
    sample = DetDataSample(metainfo=dict(img_shape=(60, 16), scale_factor=(2, 2)))
    (found,) = file.val_step(dict(inputs=torch.zeros(1, 3, 64, 64), data_samples=[sample]))
    expected = [[0, 1, 8, 30]] if clips else [[-4, 1, 10, 35]]
    assert found.pred_instances.bboxes.tolist() == expected
