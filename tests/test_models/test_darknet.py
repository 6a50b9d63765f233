import struct

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet')
from mmengine.model import BaseModule
from torch import nn

from mmexpand.models import YOLOLite
from mmexpand.models.darknet import load_darknet_weights


def write_weights(path, model, version=(0, 1, 0), seed=0):
    """A darknet file for a model; returns the values by key."""
    rng = np.random.default_rng(seed)
    seen = struct.pack('<i' if version[1] < 2 else '<q', 64_000)
    data = struct.pack('<3i', *version) + seen
    values = {}
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            for kind in ('bias', 'weight'):
                value = rng.standard_normal(getattr(conv, kind).shape).astype('<f4')
                values[f'{name}.{kind}'] = value
                data += value.tobytes()
    path.write_bytes(data)
    return values


@pytest.fixture
def model():
    return YOLOLite(channels=(4, 6))


@pytest.mark.parametrize('version', [(0, 1, 0), (0, 2, 0), (0, 2, 5)])
def test_values_arrive_under_their_keys(tmp_path, model, version):
    expected = write_weights(tmp_path / 'x.weights', model, version)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state_dict = load_darknet_weights(tmp_path / 'x.weights', model)
    assert state_dict.keys() == model.state_dict().keys() == expected.keys()
    for key, value in state_dict.items():
        assert value.dtype == torch.float32
        assert np.array_equal(value.numpy(), expected[key])
        assert torch.equal(before[key], model.state_dict()[key])
    model.load_state_dict(state_dict)


def test_truncated_file(tmp_path, model):
    path = tmp_path / 'x.weights'
    write_weights(path, model)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf'expected {size} bytes.*found {size - 10}.*truncated'):
        load_darknet_weights(path, model)


def test_file_of_another_network(tmp_path, model):
    path = tmp_path / 'x.weights'
    write_weights(path, YOLOLite(channels=(4, 7)))
    size = path.stat().st_size
    with pytest.raises(ValueError, match=rf"expected \d+ bytes.*found {size}.*another network's"):
        load_darknet_weights(path, model)


def test_foreign_file(tmp_path, model):
    path = tmp_path / 'x.pth'
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match='not a darknet weight file'):
        load_darknet_weights(path, model)


def test_empty_file(tmp_path, model):
    (tmp_path / 'x.weights').write_bytes(b'')
    with pytest.raises(ValueError, match='too short'):
        load_darknet_weights(tmp_path / 'x.weights', model)


def test_values_that_are_not_finite(tmp_path, model):
    path = tmp_path / 'x.weights'
    write_weights(path, model)
    path.write_bytes(path.read_bytes()[:-4] + struct.pack('<f', float('nan')))
    with pytest.raises(ValueError, match='not finite'):
        load_darknet_weights(path, model)


def test_model_with_batch_norm_is_refused(tmp_path):
    class WithNorm(BaseModule):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, bias=False)
            self.bn = nn.BatchNorm2d(4)

    with pytest.raises(ValueError, match=r'conv\.bias'):
        load_darknet_weights(tmp_path / 'never_read.weights', WithNorm())
