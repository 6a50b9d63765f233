"""The weights of a checkpoint are read whatever stands beside them, and nothing is run."""

import collections
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from mmexpand.surgery.checkpoint import CheckpointError, load_checkpoint
from mmexpand.surgery.weights import load_own


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Kept(list):
    """An object with state, items and arguments."""

    def __init__(self, value):
        super().__init__([value])
        self.value = value


def strange_meta(path):
    counts = collections.defaultdict(list)
    counts['a'].append(1)
    return dict(
        palette=np.zeros((3, 3), np.uint8),
        classes=np.array(['car', 'road']),
        objects=[Kept(3), counts, {1, 2}, frozenset([3]), complex(1, 2), np.float16(3)],
        payload=Payload(path),
    )


def test_weights_are_read_and_nothing_is_run(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).half()
    path, made = tmp_path / 'best.pth', tmp_path / 'made'
    torch.save(dict(meta=strange_meta(made), state_dict=model.state_dict()), path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    weights = load_own(path)['state_dict']
    assert list(weights) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(weights[name], value)
        assert weights[name].dtype == value.dtype
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists(), 'the payload is none'


def test_parameters_keep_their_values(tmp_path):
    weight = nn.Parameter(torch.randn(3))
    torch.save(dict(state_dict=dict(weight=weight)), tmp_path / 'w.pth')
    assert torch.equal(load_own(tmp_path / 'w.pth')['state_dict']['weight'], weight)


@pytest.mark.parametrize('length', [0, 10, 1000, -10])
def test_half_a_file_is_refused(tmp_path, length):
    path = tmp_path / 'best.pth'
    torch.save(dict(state_dict=dict(weight=torch.ones(1000))), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match='truncated'):
        load_own(path)


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (dict(state_dict=dict(weight=3)), 'weight in its state_dict is not a tensor'),
        (dict(state_dict=dict(weight=Kept(3))), 'weight in its state_dict is not a tensor'),
        ([1, 2], 'no state_dict'),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=words):
        load_own(tmp_path / 'x.pth')


def test_a_bare_pickle_runs_nothing(tmp_path):
    path, made = tmp_path / 'x.pth', tmp_path / 'made'
    path.write_bytes(pickle.dumps(Payload(made)))
    with pytest.raises(CheckpointError):
        load_own(path)
    assert not made.exists()
