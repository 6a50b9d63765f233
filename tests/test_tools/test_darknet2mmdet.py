import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet')
from mmdet.apis import inference_detector, init_detector

from tests.tools_in_process import run_apart

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs/yolo_lite/yolo-lite_1xb64-600k_voc0712-224x224.py'
PUBLISHED = ROOT.parent / 'shared/data/yolo-lite'
NUM_FLOATS = 572_317


def run_tool(*args):
    return run_apart(ROOT / 'tools/model_converters/darknet2mmdet.py', *args)


@pytest.fixture(scope='module')
def synthetic(tmp_path_factory):
    """A weight file of random values, and the values."""
    values = np.random.default_rng(0).normal(0, 0.05, NUM_FLOATS).astype('<f4')
    path = tmp_path_factory.mktemp('darknet') / 'synthetic.weights'
    path.write_bytes(struct.pack('<4i', 0, 1, 0, 64) + values.tobytes())
    return path, values


def test_synthetic_file(synthetic, tmp_path):
    path, values = synthetic
    out = tmp_path / 'out.pth'
    result = run_tool(path, out, '--config', CONFIG)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == [out]

    checkpoint = torch.load(out, weights_only=True)
    meta = checkpoint['meta']['dataset_meta']
    assert len(meta['classes']) == len(meta['palette']) == 20
    assert meta['classes'][6] == 'car'
    # Biases first, then weights, layer by layer; the last layer is the head's 1x1.
    state_dict = checkpoint['state_dict']
    assert np.array_equal(state_dict['backbone.convs.0.conv.bias'].numpy(), values[:16])
    assert np.array_equal(
        state_dict['backbone.convs.0.conv.weight'].flatten().numpy(), values[16 : 16 + 432]
    )
    assert np.array_equal(
        state_dict['bbox_head.convs.1.weight'].flatten().numpy(), values[-125 * 256 :]
    )

    model = init_detector(str(CONFIG), str(out), device='cpu')
    assert model.dataset_meta['classes'][6] == 'car'
    image = np.random.default_rng(1).integers(0, 256, (60, 90, 3), np.uint8)
    assert inference_detector(model, image).pred_instances.bboxes.shape[1] == 4


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda data: data[:1000], r'expected 2289284 bytes.*found 1000'),
        (lambda data: data + data, r'expected 2289284 bytes.*found 4578568'),
        (lambda data: b'PK\x03\x04' + data, 'not a darknet weight file'),
    ],
)
def test_bad_file_is_refused_and_nothing_overwritten(synthetic, tmp_path, damage, message):
    bad, out = tmp_path / 'bad.weights', tmp_path / 'out.pth'
    bad.write_bytes(damage(synthetic[0].read_bytes()))
    out.write_text('kept')
    result = run_tool(bad, out)
    assert result.returncode == 1
    assert 'Traceback' not in result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert out.read_text() == 'kept'


def test_missing_file(tmp_path):
    result = run_tool(tmp_path / 'missing.weights', tmp_path / 'out.pth')
    assert result.returncode == 1
    assert 'missing.weights' in result.stderr
    assert 'Traceback' not in result.stderr


@pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason=f"the authors' published weights are not in {PUBLISHED}"
)
def test_published_weights_find_bicycle_dog_and_car(tmp_path):
    out = tmp_path / 'yolo_lite.pth'
    result = run_tool(PUBLISHED / 'tiny-yolov2-trial3-noBatch.weights', out)
    assert result.returncode == 0, result.stderr
    model = init_detector(str(CONFIG), str(out), device='cpu')
    found = inference_detector(model, str(PUBLISHED / 'dog.jpg')).pred_instances[:3]
    names = [model.dataset_meta['classes'][label] for label in found.labels]
    assert names == ['bicycle', 'dog', 'car']
    np.testing.assert_allclose(found.scores, [0.972, 0.793, 0.649], atol=0.01)
    boxes = [[164, 138, 594, 452], [125, 186, 423, 538], [432, 81, 557, 152]]
    np.testing.assert_allclose(found.bboxes, boxes, atol=2)
