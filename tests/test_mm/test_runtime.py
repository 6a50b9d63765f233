"""mmengine's checkpoints without running what they say; configs on a machine without a GPU."""

import argparse
import pickle
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.registry import OPTIMIZERS, PARAM_SCHEDULERS

from mmexpand.mm.compact_config import make_compact_config
from mmexpand.mm.contraction import check_writable
from mmexpand.mm.datasets import check_datasets
from mmexpand.mm.runtime import prepare_cpu
from mmexpand.surgery.checkpoint import CheckpointError, load_checkpoint, load_file


def test_log_history_loads_with_weights_only(tmp_path):
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    content = dict(message_hub=dict(loss=buffer), state_dict=dict(x=torch.zeros(1)))
    torch.save(content, tmp_path / 'x.pth')
    loaded = load_checkpoint(tmp_path / 'x.pth')['message_hub']['loss']
    assert loaded.mean() == 1.5


OPTIONS = dict(
    milestones=[1],
    gamma=0.9,
    step_size=2,
    T_max=5,
    eta_max=0.1,
    end=10,
    begin=0,
    eta_min=0.0,
    periods=[5],
    restart_weights=[1],
    monitor='loss',
)
"""The arguments of every scheduler."""


@pytest.mark.parametrize('name', sorted(n for n in PARAM_SCHEDULERS.module_dict if 'LR' in n))
def test_states_of_stock_schedulers_load_with_weights_only(tmp_path, name):
    scheduler = PARAM_SCHEDULERS.get(name)
    taken = {key for base in scheduler.__mro__ for key in signature(base.__init__).parameters}
    given = {key: value for key, value in OPTIONS.items() if key in taken}
    if 'Restart' in name:
        given = dict(periods=[5], restart_weights=[1], eta_min=0.0)
    optimizer = OptimWrapper(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1))
    built = scheduler(optimizer, **given)
    state = built.state_dict()
    torch.save(dict(param_schedulers=[state]), tmp_path / 'x.pth')
    loaded = load_file(tmp_path / 'x.pth')['param_schedulers'][0]
    assert loaded == state
    built.load_state_dict(loaded)
    built.step()


@pytest.mark.parametrize('name', ['SGD', 'Adam', 'AdamW', 'RMSprop', 'Adagrad', 'LBFGS'])
def test_states_of_stock_optimizers_load_with_weights_only(tmp_path, name):
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = OPTIMIZERS.get(name)([parameter], lr=0.1)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (parameter**2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    torch.save(dict(optimizer=optimizer.state_dict()), tmp_path / 'x.pth')
    optimizer.load_state_dict(load_file(tmp_path / 'x.pth')['optimizer'])


@pytest.mark.parametrize('kind', [*'?bBhHiIlLqQefdFD'])
def test_numbers_of_numpy_load_with_weights_only(tmp_path, kind):
    array = np.asfortranarray(np.arange(6).reshape(2, 3).astype(kind))
    torch.save(dict(array=array, scalar=array[1, 1]), tmp_path / 'x.pth')
    loaded = load_file(tmp_path / 'x.pth')
    assert loaded['array'].dtype == array.dtype
    assert np.array_equal(loaded['array'], array)
    assert loaded['scalar'] == array[1, 1]


@pytest.mark.parametrize(
    ('value', 'blocked'),
    [
        (np.array(['car']), r"numpy\.dtype\('U3'\)"),
        (np.array([None]), r"numpy\.dtype\('O8'\)"),
        (np.zeros(1, 'i4,f8'), r"numpy\.dtype\('V12'\)"),
        (argparse.Namespace(lr=1), r'argparse\.Namespace'),
        (torch.nn.Linear(2, 2), r'torch\.nn\.modules\.linear\.Linear'),
        (Path('x'), r'pathlib\.\w*Path'),
    ],
)
def test_what_is_blocked_is_named(tmp_path, value, blocked):
    torch.save(dict(state_dict=dict(x=torch.zeros(1)), extra=value), tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=rf'x\.pth .*{blocked}.*could run code') as error:
        load_checkpoint(tmp_path / 'x.pth')
    assert 'corrupt' not in str(error.value)


class Reduced:
    """An attacker's pickle: a call, and a state for its result."""

    def __init__(self, *reduced: Any):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def test_no_array_of_pointers_can_be_made(tmp_path):
    # A copy of a number's type with fields of objects, and an array made of a buffer.
    state = (3, '<', None, ('a',), {'a': (np.dtype('f8'), 0)}, 8, 8, 63)
    torch.save(dict(x=Reduced(np.dtype, ('f8', False, True), state)), tmp_path / 'x.pth')
    assert load_file(tmp_path / 'x.pth')['x'] is np.dtype('f8')
    assert np.dtype('f8').fields is None
    torch.save(dict(x=Reduced(np.ndarray, ((1,), 'O', b'12345678'))), tmp_path / 'x.pth')
    with pytest.raises(CheckpointError):
        load_file(tmp_path / 'x.pth')


@pytest.mark.parametrize(
    'call',
    [
        (getattr, (HistoryBuffer, '__init__')),
        (getattr, (HistoryBuffer, '_statistics_methods')),
        (getattr, (OneCycleParamScheduler, '__init__')),
        (getattr, (dict, 'fromkeys')),
        (eval, ('1',)),
        (np.dtype, ('O',)),
    ],
)
def test_nothing_else_gets_through(tmp_path, call):
    class Trick:
        def __reduce__(self):
            return call

    torch.save(dict(x=Trick()), tmp_path / 'x.pth')
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / 'x.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'x.pth', weights_only=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_sync_bn_becomes_bn_without_a_gpu():
    heads = [dict(type='mmengine.SyncBN'), dict(type=torch.nn.SyncBatchNorm)]
    cfg = Config(dict(model=dict(norm_cfg=dict(type='SyncBN'), heads=heads), sync_bn='torch'))
    prepare_cpu(cfg)
    assert {cfg.model.norm_cfg.type, *(head.type for head in cfg.model.heads)} == {'BN'}
    assert 'sync_bn' not in cfg
    assert 'model_wrapper_cfg' not in cfg
    with pytest.raises(ValueError, match='--launcher pytorch'):
        prepare_cpu(Config(dict(launcher='slurm')))


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
@pytest.mark.parametrize('wrapper', [None, dict(broadcast_buffers=True, device_ids=[0])])
def test_wrappers_of_processes_without_a_gpu(wrapper, monkeypatch):
    """The compact config has none that is ours, and can be run in such processes again."""
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    cfg = dict(launcher='pytorch', find_unused_parameters=True, model=dict(type='Net'))
    cfg = Config(dict(cfg, model_wrapper_cfg=wrapper))
    for _ in range(2):
        prepare_cpu(cfg)
        found = cfg.model_wrapper_cfg
        assert found.type == 'MMDistributedDataParallel'
        assert (found.device_ids, found.find_unused_parameters) == (None, True)
        assert found.broadcast_buffers == (wrapper is not None)
        compact = make_compact_config(cfg)
        assert (compact.get('model_wrapper_cfg') is None) == (wrapper is None)
        cfg = compact
        cfg.launcher = 'pytorch'


def test_missing_data_is_named_with_the_place_looked_at(tmp_path):
    def cfg(**dataset):
        wrapped = dict(type='RepeatDataset', dataset=dict(type='VOCDataset', **dataset))
        return Config(dict(train_dataloader=dict(dataset=wrapped)))

    (tmp_path / 'img').mkdir()
    there = dict(data_root=str(tmp_path), data_prefix=dict(img='img'))
    check_datasets(cfg(**there), ('train', 'val'))
    with pytest.raises(FileNotFoundError, match=r'ann_file not found.*ImageSets/x\.txt') as error:
        check_datasets(cfg(**there, ann_file='ImageSets/x.txt'), ('train',))
    assert 'train_dataloader.dataset.dataset.data_root=' in str(error.value)
    with pytest.raises(FileNotFoundError, match=r'data_root not found.*nowhere'):
        check_datasets(cfg(data_root='nowhere'), ('train',))


def test_work_dir_that_cannot_be_written(tmp_path):
    check_writable(tmp_path / 'new')
    (tmp_path / 'file').write_text('')
    with pytest.raises(PermissionError, match='--work-dir'):
        check_writable(tmp_path / 'file' / 'sub')
