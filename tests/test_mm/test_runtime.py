"""mmengine's checkpoints without running what they say; configs on a machine without a GPU."""

import pickle

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer

from mmexpand.mm.contraction import check_writable
from mmexpand.mm.datasets import check_datasets
from mmexpand.mm.runtime import prepare_cpu
from mmexpand.surgery.checkpoint import CheckpointError, load_checkpoint


def test_log_history_loads_with_weights_only(tmp_path):
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save(dict(message_hub=dict(loss=buffer)), tmp_path / 'x.pth')
    loaded = load_checkpoint(tmp_path / 'x.pth')['message_hub']['loss']
    assert loaded.mean() == 1.5


@pytest.mark.parametrize(
    'call', [(getattr, (HistoryBuffer, '__init__')), (getattr, (dict, 'fromkeys')), (eval, ('1',))]
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
    cfg = Config(dict(model=dict(norm_cfg=dict(type='SyncBN'), heads=[dict(type='SyncBN')])))
    prepare_cpu(cfg)
    assert cfg.model.norm_cfg.type == cfg.model.heads[0].type == 'BN'
    assert 'model_wrapper_cfg' not in cfg
    with pytest.raises(ValueError, match='--launcher pytorch'):
        prepare_cpu(Config(dict(launcher='slurm')))


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
