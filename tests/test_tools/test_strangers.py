"""Checkpoints of strangers: what they hold is never run, whichever tool is given them."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader
from mmseg.datasets import CityscapesDataset
from safetensors import safe_open

import mmexpand
from mmexpand.mm import launch
from mmexpand.mm.models import build_expanded_model
from mmexpand.surgery.checkpoint import WEIGHTS_ONLY
from tests.conftest import small_config
from tests.tools_in_process import run


class Payload:
    """Pickled as a call: loading it without care makes the call."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


PAYLOADS = {
    'reduce': lambda path: Payload(os.mkdir, path),
    'eval': lambda path: Payload(eval, f"__import__('os').mkdir({path!r})"),
    # A method goes into a pickle as getattr of its object.
    'getattr': lambda path: Payload(np.zeros(1).tofile, path),
}
TOOLS = {
    'resume': 'train.py {CONFIG} --work-dir {OUT} --resume {BAD}',
    'automatic resume': 'train.py {CONFIG} --work-dir {WORK} --resume',
    'load_from': 'train.py {CONFIG} --work-dir {OUT} --cfg-options load_from={BAD}',
    'pretrained': 'train.py {CONFIG} --work-dir {OUT} --cfg-options '
    'model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint={BAD}',
    'test': 'test.py {CONFIG} {BAD} --work-dir {OUT}',
    'contract': 'contract.py {CONFIG} {BAD} --work-dir {OUT}',
    'contract without data': 'contract.py {CONFIG} {BAD} --work-dir {OUT} --shape 32 48',
    'export': 'export_onnx.py {CONFIG} {BAD} --out {OUT}/net.onnx --image {IMAGE}',
    'browse': 'analysis_tools/browse_results.py {CONFIG} {BAD} --out-dir {OUT}',
    'landscape': 'analysis_tools/loss_landscape.py {CONFIG} {BAD} --out-dir {OUT}',
    'darknet': 'model_converters/darknet2mmdet.py {BAD} {OUT}/net.pth',
}


@pytest.fixture(scope='module')
def config(tmp_path_factory, street):
    root = tmp_path_factory.mktemp('strangers')
    cfg = small_config(street, root / 'work_dir')
    cfg.param_scheduler = [dict(type='OneCycleLR', eta_max=0.01, total_steps=8, by_epoch=False)]
    cfg.visualizer = dict(type='SegLocalVisualizer', name='strangers')
    cfg.dump(root / 'config.py')
    return cfg, root / 'config.py'


def write_bad(config, path, payload) -> None:
    model = build_expanded_model(config[0])
    torch.save(dict(meta=dict(x=payload), state_dict=model.state_dict()), path)


@pytest.mark.parametrize('payload', PAYLOADS)
@pytest.mark.parametrize('tool', TOOLS)
def test_a_payload_is_never_run(config, street, tmp_path, tool, payload):
    trap, bad = tmp_path / 'trap', tmp_path / 'bad.pth'
    write_bad(config, bad, PAYLOADS[payload](str(trap)))
    places = dict(CONFIG=config[1], OUT=tmp_path / 'out', BAD=bad, WORK=tmp_path / 'work')
    places['IMAGE'] = next(street.glob('leftImg8bit/train/town/*.png'))
    places['WORK'].mkdir()
    (places['WORK'] / 'last_checkpoint').write_text(str(bad))
    status, message = run(*(part.format(**places) for part in TOOLS[tool].split()))
    assert not trap.exists()
    assert status == 1
    assert str(bad) in message
    assert ('could run code' in message) == (tool != 'darknet'), message
    # And it would have been: this is what the others save us from.
    torch.load(bad, weights_only=False)
    assert trap.exists()


def test_a_framework_that_loads_everything_is_held_back(config, tmp_path, monkeypatch):
    """OneDL's mmengine passes ``weights_only=False``, for checkpoints and for init_cfg."""

    def load_all(filename, map_location):
        return torch.load(filename, map_location=map_location, weights_only=False)

    monkeypatch.setitem(CheckpointLoader._schemes, '', load_all)
    monkeypatch.setattr(launch, '_check_checkpoints', lambda *_, **__: None)
    trap, bad = tmp_path / 'trap', tmp_path / 'bad.pth'
    write_bad(config, bad, PAYLOADS['reduce'](str(trap)))
    for tool in ('load_from', 'pretrained'):
        places = dict(CONFIG=config[1], OUT=tmp_path / 'out', BAD=bad)
        status, message = run(*(part.format(**places) for part in TOOLS[tool].split()))
        assert not trap.exists()
        assert status == 1
        assert 'could run code' in message
    assert WEIGHTS_ONLY not in os.environ
    load_all(bad, 'cpu')
    assert trap.exists()


def test_what_mmengine_writes_itself_is_resumed(config, tmp_path, monkeypatch):
    """OneCycleLR keeps one of its methods in its state; class names may be a numpy array."""
    names, colours = (CityscapesDataset.METAINFO[key] for key in ('classes', 'palette'))
    metainfo = dict(classes=np.array(names), palette=np.array(colours, np.uint8))
    monkeypatch.setattr(CityscapesDataset, 'metainfo', property(lambda _: metainfo))
    arguments = ('--work-dir', tmp_path, '--cfg-options', 'train_cfg.max_iters=2')
    assert run('train.py', config[1], *arguments) == (0, '')
    assert run('train.py', config[1], '--work-dir', tmp_path, '--resume') == (0, '')
    checkpoint = torch.load(tmp_path / 'iter_4.pth', weights_only=True)
    assert checkpoint['meta']['dataset_meta']['classes'] == list(names)
    state = checkpoint['param_schedulers'][0]
    assert state['anneal_func'].__name__ == '_annealing_cos'
    assert state['_global_step'] == 4


def test_contract_writes_safetensors_too(config, tmp_path):
    checkpoint = tmp_path / 'expanded.pth'
    model = build_expanded_model(config[0])
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    arguments = ('--work-dir', tmp_path, '--shape', 32, 48)
    assert run('contract.py', config[1], checkpoint, *arguments) == (0, '')
    expected = mmexpand.contract(model).state_dict()
    with safe_open(tmp_path / 'compact_expanded.safetensors', 'pt') as file:
        assert set(file.keys()) == set(expected)
        assert all(torch.equal(file.get_tensor(key), value) for key, value in expected.items())
        assert '"kind": "compact"' in file.metadata()['mmexpand']
