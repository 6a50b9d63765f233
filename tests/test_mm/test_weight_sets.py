"""After training every set of weights is written on its own: one that fails costs no other."""

import errno
import json
import os
import shutil
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.visualization import Visualizer
from mmseg.datasets import CityscapesDataset
from mmseg.models import EncoderDecoder, FCNHead
from mmseg.registry import DATASETS, MODELS

from mmexpand import ExpandedConv2d
from mmexpand.mm import contraction
from mmexpand.mm.hooks import ContractHook, ContractionError
from mmexpand.surgery.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tests.processes import run_workers
from tests.runs import log_of, train

EMA = dict(type='EMAHook', momentum=0.1)
EXPAND = dict(type='ExpandHook', method='cl', include='backbone.encoder', rate=2)
CONTRACT = dict(type='ContractHook')
SETS = ('last', 'best', 'ema')
WORKER = Path(__file__).with_name('weight_sets_worker.py')


def three_sets(seg_cfg, **changes):
    changes = {'custom_hooks': [EXPAND, EMA, CONTRACT], **changes}
    return seg_cfg(**{'default_hooks.checkpoint.save_best': 'mIoU', **changes})


def written(cfg) -> set[str]:
    names = {path.name for path in Path(cfg.work_dir).iterdir()}
    assert not [name for name in names if 'tmp' in name or name.startswith('.')]
    return {name for name in names if name.startswith('compact_')}


def files_of(sets) -> set[str]:
    kinds = ('pth', 'safetensors') if find_spec('safetensors') else ('pth',)
    return {f'compact_{name}.{kind}' for name in sets for kind in kinds} | {'compact_config.py'}


def wrong_conv(unit):
    conv = to_conv(unit)
    conv.weight.data += 1
    return conv


def fail(*args, **kwargs):
    raise RuntimeError('evaluation is broken')


def disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, 'No space left on device')


to_conv = ExpandedConv2d.to_conv
FAULTS = {
    'contract': (ExpandedConv2d, 'to_conv', wrong_conv, 'contraction changes the model'),
    'evaluate': (EncoderDecoder, 'val_step', fail, 'evaluation is broken'),
    'write': (contraction, 'save_checkpoint', disk_full, 'No space left on device'),
}


contract = ContractHook._contract


def failing_for(failing, owner, name, fault):
    """``ContractHook._contract`` with a fault for one set of weights."""

    def wrapper(self, runner, weights, *args):
        with pytest.MonkeyPatch.context() as patch:
            if weights == failing:
                patch.setattr(owner, name, fault)
            contract(self, runner, weights, *args)

    return wrapper


@pytest.mark.parametrize('stage', FAULTS)
def test_a_set_that_fails_costs_none_of_the_others(seg_cfg, monkeypatch, stage):
    for failing in SETS:
        cfg = three_sets(seg_cfg)
        cfg.work_dir += failing
        words = FAULTS[stage][-1]
        monkeypatch.setattr(ContractHook, '_contract', failing_for(failing, *FAULTS[stage][:3]))
        with pytest.raises(
            ContractionError, match=rf'^1 of the compact files .* {failing}: .*{words}'
        ):
            train(cfg)
        assert written(cfg) == files_of(set(SETS) - {failing})
        for path in Path(cfg.work_dir).glob('compact_*.pth'):
            assert load_checkpoint(path)['meta']['mmexpand']['metrics_compact']['mIoU'] > 0


def test_every_failure_is_reported_and_nothing_else_is_written(seg_cfg, monkeypatch):
    monkeypatch.setattr(contraction, 'save_checkpoint', disk_full)
    with pytest.raises(
        ContractionError, match=r'3 of the compact files.*last: .*ema: .*best: '
    ) as caught:
        train(cfg := three_sets(seg_cfg))
    assert str(caught.value).count('No space left') == 3
    assert written(cfg) == set()
    assert list(Path(cfg.work_dir).glob('iter_4.pth'))


@DATASETS.register_module()
class ArrayMeta(CityscapesDataset):
    """Says its classes and colours in arrays, as users' data sets do."""

    METAINFO = dict(
        CityscapesDataset.METAINFO,
        names=np.array(CityscapesDataset.METAINFO['classes']),
        colours=np.array(CityscapesDataset.METAINFO['palette'], np.uint8),
    )


@HOOKS.register_module()
class OddMeta(Hook):
    """Puts into a checkpoint's meta what loading weights alone refuses, as users' hooks do."""

    priority = 'LOWEST'

    def before_save_checkpoint(self, runner, checkpoint):
        checkpoint['meta']['odd'] = [Path('data'), np.array(['car', 'road']), datetime.now()]


def test_arrays_in_the_metainfo_and_objects_in_the_best_checkpoint(seg_cfg):
    changes = {f'{split}_dataloader.dataset.type': 'ArrayMeta' for split in ('train', 'val')}
    cfg = three_sets(seg_cfg, **changes, custom_hooks=[EXPAND, EMA, dict(type='OddMeta'), CONTRACT])
    train(cfg)
    assert written(cfg) == files_of(SETS)
    for name in SETS:
        meta = torch.load(f'{cfg.work_dir}/compact_{name}.pth', weights_only=True)['meta']
        assert meta['dataset_meta']['names'][13] == 'car'
        assert meta['dataset_meta']['colours'][13] == [0, 0, 142]
    with pytest.raises(CheckpointError):
        load_checkpoint(next(Path(cfg.work_dir).glob('best_*.pth')))


@pytest.mark.parametrize('with_best', [True, False])
def test_best_of_a_moved_work_dir(seg_cfg, with_best):
    cfg = three_sets(seg_cfg)
    cfg.train_cfg.max_iters = 2
    train(cfg)
    # No better score to come.
    checkpoint = torch.load(f'{cfg.work_dir}/iter_2.pth', weights_only=False)
    checkpoint['message_hub']['runtime_info']['best_score'] = 1000.0
    save_checkpoint(checkpoint, f'{cfg.work_dir}/iter_2.pth')
    moved = cfg.work_dir + '_moved'
    shutil.move(cfg.work_dir, moved)
    for path in Path(moved).glob('compact_*' if with_best else '*_*t*_*'):
        path.unlink()
    for path in Path(moved).glob('compact_*'):
        path.unlink()
    resumed = three_sets(seg_cfg, resume=True, load_from=f'{moved}/iter_2.pth')
    resumed.work_dir = moved
    train(resumed)
    if with_best:
        assert written(resumed) == files_of(SETS)
        return
    assert written(resumed) == files_of(('last', 'ema'))
    log = max(Path(moved).glob('*/*.log'), key=os.path.getmtime).read_text()
    assert 'WARNING - ContractHook: the best checkpoint' in log
    assert 'the best weights are not contracted' in log


@HOOKS.register_module()
class Diverge(Hook):
    """Makes the learning rate absurd in the last iteration, and its score no better."""

    def __init__(self, lr):
        self.lr = lr

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 3:
            runner.message_hub.update_info('best_score', 1000.0)
            for group in runner.optim_wrapper.param_groups:
                group['lr'] = self.lr


@pytest.mark.parametrize(
    ('lr', 'words'),
    [
        (1e18, 'values that are not finite, in backbone'),
        (float('inf'), 'weights are not finite, .* first'),
    ],
)
def test_diverged_weights_do_not_cost_the_best(seg_cfg, lr, words):
    cfg = three_sets(seg_cfg, custom_hooks=[EXPAND, CONTRACT, dict(type='Diverge', lr=lr)])
    with pytest.raises(ContractionError, match=f'last: .*{words}.*training has div') as caught:
        train(cfg)
    assert '1 of the compact files' in str(caught.value)
    assert written(cfg) == files_of(['best'])


@MODELS.register_module()
class KeepsOutput(EncoderDecoder):
    """Keeps an output with its history on itself."""

    def extract_feat(self, inputs):
        self.last = super().extract_feat(inputs)
        return self.last


def test_a_model_that_keeps_an_output(seg_cfg):
    # EMAHook copies the model too, before it has run.
    cfg = three_sets(seg_cfg, **{'model.type': 'KeepsOutput'})
    runner = train(cfg)
    assert runner.model.last[0] is not None
    assert written(cfg) == files_of(SETS)


@MODELS.register_module()
class ReadsWeight(FCNHead):
    """Reads the weight of its last layer instead of calling it, as mmseg's K-Net."""

    def cls_seg(self, feat):
        return F.conv2d(feat, self.conv_seg.weight.clone(), self.conv_seg.bias)


def test_a_weight_that_is_only_read(seg_cfg):
    """EMAHook copies the initial weights on offer, which its copy must not keep."""
    cfg = three_sets(seg_cfg, **{'model.decode_head.type': 'ReadsWeight'})
    cfg.custom_hooks[0] = dict(EXPAND, include='decode_head.conv_seg', init='default')
    train(cfg)
    assert written(cfg) == files_of(SETS)


@pytest.mark.skipif(not find_spec('safetensors'), reason='requires safetensors')
def test_a_failure_of_safetensors_leaves_the_checkpoint(seg_cfg, monkeypatch):
    class SafetensorError(Exception):
        pass

    def full(*args):
        raise SafetensorError('No space left on device')

    monkeypatch.setattr(contraction, 'save_safetensors', full)
    cfg = three_sets(seg_cfg)
    train(cfg)
    assert written(cfg) == {name for name in files_of(SETS) if 'safetensors' not in name}
    assert 'compact_last.safetensors was not written' in log_of(cfg)


@pytest.fixture(scope='module')
def two_processes(street, tmp_path_factory):
    """Results of weight_sets_worker.py, by case and rank."""
    directory = tmp_path_factory.mktemp('two')
    run_workers(WORKER, street, directory)
    return directory


@pytest.mark.parametrize('rank', [0, 1])
@pytest.mark.parametrize('stage', ['copy', 'contract', 'evaluate', 'read', 'metric', 'write'])
def test_a_failure_on_one_of_two_ranks(two_processes, stage, rank):
    if rank == 1 and stage in ('metric', 'write', 'contract'):
        pytest.skip('only the main process does that')
    case = two_processes / f'{stage}{rank}'
    messages = [json.loads((case / f'message_{r}.json').read_text()) for r in (0, 1)]
    for message in messages:
        assert message.startswith('1 of the compact files')
        assert 'best: ' in message
        assert f'broken {stage}' in message
    assert (f'rank {rank}' in messages[1 - rank]) and (f'rank {rank}' not in messages[rank])
    names = {path.name for path in (case / 'work_dir').glob('compact_*')}
    assert names == files_of(('last', 'ema'))


def test_two_ranks_without_a_failure(two_processes):
    case = two_processes / 'none0'
    assert {path.name for path in (case / 'work_dir').glob('compact_*')} == files_of(SETS)
    assert json.loads((case / 'message_0.json').read_text()) == ''


def test_a_dry_run_that_fails_on_one_rank_ends_both(two_processes):
    case = two_processes / 'dry1'
    messages = [json.loads((case / f'message_{r}.json').read_text()) for r in (0, 1)]
    assert all('"evaluate one batch" would fail' in message for message in messages)
    assert 'rank 1' in messages[0]
    assert not list((case / 'work_dir').glob('*.pth'))


def test_a_visualizer_that_fails_costs_no_file(seg_cfg, monkeypatch):
    cfg = three_sets(seg_cfg)
    add = Visualizer.add_scalars

    def fail(self, scalars, *args, **kwargs):
        if any(name.startswith('compact/') for name in scalars):
            raise OSError('no space left')
        return add(self, scalars, *args, **kwargs)

    monkeypatch.setattr(Visualizer, 'add_scalars', fail)
    train(cfg)
    assert written(cfg) == files_of(SETS)
    assert 'metrics are not logged: OSError: no space left' in log_of(cfg)


def test_the_best_of_two_checkpoint_hooks_are_two_files(seg_cfg):
    other = dict(type='CheckpointHook', interval=2, by_epoch=False, save_best='aAcc')
    cfg = three_sets(seg_cfg, custom_hooks=[EXPAND, other, CONTRACT])
    train(cfg)
    assert written(cfg) == files_of(['last', 'best_mIoU', 'best_aAcc'])


def test_versions_of_modules_are_kept(seg_cfg):
    """Heads of mmdet rename the weights of a state dict without a version."""
    cfg = three_sets(seg_cfg)
    train(cfg)
    for name in SETS:
        state_dict = load_checkpoint(f'{cfg.work_dir}/compact_{name}.pth')['state_dict']
        assert state_dict._metadata['decode_head.conv_seg']['version'] == 1, name
