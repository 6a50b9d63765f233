import copy
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
import onnx
import onnxruntime
from mmengine.config import Config
from mmseg.apis import inference_model, init_model

import mmexpand.deploy.onnx as deploy
from mmexpand import stack
from mmexpand.deploy import export_onnx, load_compact_model, preprocess
from mmexpand.deploy.decoding import MAX_DETECTIONS, decoder_of
from mmexpand.deploy.network import RawOutputs
from mmexpand.mm.models import build_compact_model, build_expanded_model
from mmexpand.surgery.checkpoint import CheckpointError
from tests.test_deploy.networks import randomise
from tests.tools_in_process import run_apart

ROOT = Path(__file__).parents[2]
YOLO = ROOT / 'configs/yolo_lite/yolo-lite_expand-cl-r4_1xb64-600k_voc0712-224x224.py'
UNET = ROOT / 'configs/unet/unet-s5-d16_expand-cl-r4_fcn_4xb4-160k_cityscapes-512x1024.py'


def small(path):
    cfg = Config.fromfile(path)
    if path == UNET:
        cfg.merge_from_dict(
            {
                'model.backbone.base_channels': 4,
                'model.decode_head.in_channels': 4,
                'model.decode_head.channels': 4,
                'model.auxiliary_head.in_channels': 8,
                'model.auxiliary_head.channels': 4,
                'test_dataloader.dataset.pipeline.1.scale': (90, 70),
            }
        )
    else:
        cfg.merge_from_dict(
            {
                'model.backbone.channels': (4, 8, 8, 8, 8),
                'model.bbox_head.in_channels': 8,
                'test_dataloader.dataset.pipeline.1.scale': (96, 64),
            }
        )
    return cfg


@pytest.fixture(scope='module', params=[YOLO, UNET], ids=['yolo-lite', 'unet'])
def trained(request, tmp_path_factory):
    """Config, expanded model and its checkpoint."""
    cfg = small(request.param)
    torch.manual_seed(0)
    model = randomise(build_expanded_model(cfg))
    path = tmp_path_factory.mktemp('trained') / 'expanded.pth'
    torch.save(dict(meta={}, state_dict=model.state_dict()), path)
    return cfg, model, path


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return session.run(None, {'input': inputs.numpy()})


def test_expanded_checkpoint_becomes_the_compact_network(trained, picture, tmp_path):
    cfg, expanded, checkpoint = trained
    out = tmp_path / 'model.onnx'
    model = load_compact_model(cfg, checkpoint)
    report = export_onnx(model, preprocess(model, cfg, picture), out, raw=True)
    assert report.max_error <= 1e-4
    assert report.path == out
    assert [p.name for p in tmp_path.iterdir()] == ['model.onnx']
    # Another batch size, other images: against the expanded model in float64.
    inputs = torch.randn(3, *report.input_shape[1:], generator=torch.Generator().manual_seed(1))
    (found,) = run(out, inputs)
    with torch.no_grad():
        reference = RawOutputs(copy.deepcopy(expanded).double())(inputs.double())[0].numpy()
        untrained = RawOutputs(build_compact_model(cfg).eval())(inputs)[0].numpy()
    scale = np.abs(reference).max()
    np.testing.assert_allclose(found, reference, atol=1e-4 * scale, rtol=0)
    assert np.abs(found - untrained).max() > 0.05 * scale
    assert report.output_shapes == dict(output=(1, *reference.shape[1:]))


def test_file_holds_no_trace_of_expansion(trained, picture, tmp_path):
    cfg, _, checkpoint = trained
    model = load_compact_model(cfg, checkpoint)
    inputs = preprocess(model, cfg, picture)
    export_onnx(model, inputs, tmp_path / 'model.onnx')
    graph = onnx.load(tmp_path / 'model.onnx').graph
    used = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda conv, *_: used.append(tuple(conv.weight.shape)))
    with torch.no_grad():
        RawOutputs(model)(inputs)
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    convs = [weights[node.input[1]] for node in graph.node if node.op_type == 'Conv']
    assert sorted(convs) == sorted(used)
    assert len(used) >= 7
    assert not {'MatMul', 'Gemm', 'Einsum'} & {node.op_type for node in graph.node}


def test_compact_checkpoint_gives_the_same(trained, picture, tmp_path):
    cfg, _, checkpoint = trained
    model = load_compact_model(cfg, checkpoint)
    torch.save(dict(meta={}, state_dict=model.state_dict()), tmp_path / 'compact.pth')
    again = load_compact_model(cfg, tmp_path / 'compact.pth')
    inputs = preprocess(model, cfg, picture)
    for name, network in (('one', model), ('two', again)):
        export_onnx(network, inputs, tmp_path / f'{name}.onnx')
    one, two = (run(tmp_path / f'{name}.onnx', inputs)[0] for name in ('one', 'two'))
    np.testing.assert_array_equal(one, two)


def test_logits_are_those_of_mmsegs_own_inference(picture, tmp_path):
    """The preprocessing too: 70 x 90 is padded to 80 x 96."""
    cfg = small(UNET)
    torch.manual_seed(0)
    model = randomise(build_compact_model(cfg))
    torch.save(dict(meta={}, state_dict=model.state_dict()), tmp_path / 'compact.pth')
    model = load_compact_model(cfg, tmp_path / 'compact.pth')
    inputs = preprocess(model, cfg, picture)
    assert inputs.shape == (1, 3, 80, 96)
    export_onnx(model, inputs, tmp_path / 'model.onnx', raw=True)
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    stock = init_model(cfg, device='cpu')
    stock.dataset_meta = {}
    stock.load_state_dict(model.state_dict())
    expected = inference_model(stock, str(picture)).seg_logits.data.numpy()
    found = run(tmp_path / 'model.onnx', inputs)[0][0, :, :70, :90]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_difference_is_refused_and_the_old_file_stays(trained, picture, tmp_path, monkeypatch):
    cfg, _, checkpoint = trained
    model = load_compact_model(cfg, checkpoint)
    inputs = preprocess(model, cfg, picture)
    out = tmp_path / 'model.onnx'
    out.write_bytes(b'the old one')
    trace = deploy.trace

    def trace_another(network, *args):
        other = copy.deepcopy(network)
        with torch.no_grad():
            for name, value in other.named_parameters():
                if 'backbone' in name and value.dim() == 4:
                    value.mul_(1.01)
                    break
        return trace(other, *args)

    monkeypatch.setattr(deploy, 'trace', trace_another)
    with pytest.raises(RuntimeError, match=r'differ by .* allowed 0\.0001; .*model\.onnx was not'):
        export_onnx(model, inputs, out)
    assert out.read_bytes() == b'the old one'
    assert [p.name for p in tmp_path.iterdir()] == ['model.onnx']


def test_model_keeps_its_mode(trained, picture, tmp_path):
    cfg, _, checkpoint = trained
    model = load_compact_model(cfg, checkpoint)
    inputs = preprocess(model, cfg, picture)
    model.train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    export_onnx(model, inputs, tmp_path / 'model.onnx')
    assert [module.training for module in model.modules()] == modes
    assert {True, False} == set(modes)


def test_bad_input(trained, picture, tmp_path, monkeypatch):
    cfg, expanded, checkpoint = trained
    model = load_compact_model(cfg, checkpoint)
    inputs = preprocess(model, cfg, picture)
    out = tmp_path / 'model.onnx'
    with pytest.raises(ValueError, match=r'expanded; contract it first'):
        export_onnx(expanded, inputs, out)
    with pytest.raises(FileNotFoundError, match=r'nowhere\.png'):
        preprocess(model, cfg, tmp_path / 'nowhere.png')
    (tmp_path / 'text.png').write_text('no image')
    with pytest.raises(ValueError, match=r'text\.png cannot be decoded'):
        preprocess(model, cfg, tmp_path / 'text.png')
    (tmp_path / 'text.png').unlink()
    other = small(UNET if 'bbox_head' in cfg.model else YOLO)
    with pytest.raises(CheckpointError, match='another network'):
        load_compact_model(other, checkpoint)
    state_dict = {k: v for k, v in model.state_dict().items() if not k.endswith('bias')}
    torch.save(dict(state_dict=state_dict), tmp_path / 'part.pth')
    with pytest.raises(CheckpointError, match=r'part\.pth does not fit the config: .* lacks'):
        load_compact_model(cfg, tmp_path / 'part.pth')
    (tmp_path / 'part.pth').unlink()
    monkeypatch.setattr(stack, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match='ONNX requires onnx and onnxruntime: pip install'):
        export_onnx(model, inputs, out)
    assert list(tmp_path.iterdir()) == []


def test_tool(trained, picture, tmp_path):
    cfg, _, checkpoint = trained
    cfg.dump(tmp_path / 'config.py')
    out = tmp_path / 'model.onnx'
    arguments = [tmp_path / 'config.py', checkpoint, '--out', out, '--image', picture]
    result = run_apart(ROOT / 'tools/export_onnx.py', *arguments)
    assert result.returncode == 0, result.stderr
    assert 'largest error against PyTorch: ' in result.stdout
    assert out.is_file()


@pytest.mark.parametrize(('limit', 'count'), [(-1, MAX_DETECTIONS), (7, 7)])
def test_a_detector_without_a_limit_of_boxes_has_the_limit_of_the_export(limit, count):
    cfg = small(YOLO)
    cfg.model.test_cfg.max_per_img = limit
    model = build_compact_model(cfg).eval()
    decoder = decoder_of(model, torch.randn(1, 3, 64, 96))
    assert decoder.count == count
    assert decoder(torch.tensor([64, 96]), *decoder.example(model(torch.randn(1, 3, 64, 96))))[
        1
    ].shape == (count,)
