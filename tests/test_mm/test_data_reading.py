"""Data sets are read as stock OpenMMLab reads them: uncopied, and by workers if there are some."""

import threading
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.datasets import CityscapesDataset
from mmseg.evaluation import IoUMetric
from mmseg.registry import DATASETS, METRICS
from torch.utils.data import DataLoader, IterableDataset

from mmexpand.mm import datasets
from mmexpand.mm.evaluation import read_batch
from tests.runs import log_of, train
from tests.test_mm.test_distill import teacher  # noqa: F401

EXPAND = dict(type='ExpandHook', method='cl', include='backbone.encoder', rate=2)
CONTRACT = dict(type='ContractHook')
CONFUSION = dict(type='GradientConfusionHook', pairs=2, interval=2)
KD = dict(
    loss_kd=dict(
        type='KDLoss', tau=2.0, student='decode_head.conv_seg', teacher='decode_head.conv_seg'
    )
)
NO_VALIDATION = dict(val_dataloader=None, val_cfg=None, val_evaluator=None)


@DATASETS.register_module()
class OpensAtTheFirstSample(CityscapesDataset):
    """Opens its archive in the process that reads the first sample, as is usual for workers."""

    archive = None

    def __getitem__(self, index):
        if self.archive is None:
            self.archive = zipfile.ZipFile(self.data_root + '/sizes.zip')
        sample = super().__getitem__(index)
        name = Path(sample['data_samples'].img_path).name
        assert self.archive.read(name) == name.encode() * 1000
        return sample


@DATASETS.register_module()
class Locked(CityscapesDataset):
    """Can neither be copied nor pickled."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lock = threading.Lock()


def with_data(cfg, kind, workers):
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        if loader is not None:
            loader.dataset.type = kind
            loader.num_workers = workers


@pytest.fixture
def zipped(street):
    with zipfile.ZipFile(street / 'sizes.zip', 'w') as archive:
        for path in street.rglob('*_leftImg8bit.png'):
            archive.writestr(path.name, path.name * 1000)


@pytest.mark.parametrize('loop', ['iterations', 'epochs'])
def test_this_process_opens_no_file_of_a_data_set_with_workers(seg_cfg, zipped, loop):
    """Workers that are started later would share its position in the file."""
    cfg = seg_cfg(custom_hooks=[EXPAND, CONFUSION, CONTRACT])
    with_data(cfg, 'OpensAtTheFirstSample', 2)
    if loop == 'epochs':
        cfg.train_dataloader.sampler.type = 'DefaultSampler'
        cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2)
        cfg.default_hooks.checkpoint.by_epoch = True
        cfg.param_scheduler = []
    runner = train(cfg)
    assert runner.train_dataloader.dataset.archive is None
    assert runner.val_dataloader.dataset.archive is None
    assert 'dry run on one batch: 3 layers contracted' in log_of(cfg)
    assert Path(cfg.work_dir, 'compact_last.pth').exists()


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('validates', [True, False])
def test_what_cannot_be_copied_trains(seg_cfg, teacher, workers, validates):  # noqa: F811
    hooks = [EXPAND, dict(teacher, losses=KD), CONFUSION, CONTRACT]
    cfg = seg_cfg(custom_hooks=hooks, **({} if validates else NO_VALIDATION))
    with_data(cfg, 'Locked', workers)
    assert train(cfg).iter == 4
    assert 'dry run on one batch: 3 layers contracted' in log_of(cfg)
    assert Path(cfg.work_dir, 'compact_last.pth').exists()


@METRICS.register_module()
class LockedMetric(IoUMetric):
    """A metric that cannot be copied."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lock = threading.Lock()


def test_an_evaluator_that_cannot_be_copied_is_not_tried(seg_cfg):
    cfg = seg_cfg(**{'val_evaluator.type': 'LockedMetric'})
    assert train(cfg).iter == 4
    assert 'Evaluation is skipped: the evaluator cannot be copied' in log_of(cfg)
    assert Path(cfg.work_dir, 'compact_last.pth').exists()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


@pytest.mark.parametrize('workers', [0, 1])
def test_the_first_batch_of_any_loader(workers):
    how = dict(num_workers=workers, collate_fn=list)
    assert read_batch(DataLoader(Stream(), batch_size=2, **how)) == [0, 1]
    data = range(10, 20)
    assert read_batch(DataLoader(data, batch_size=3, sampler=[4, 2, 7, 1], **how)) == [14, 12, 17]
    assert read_batch(DataLoader(data, batch_sampler=[[5], [6]], **how)) == [15]
    how['collate_fn'] = str
    assert read_batch(DataLoader(data, batch_size=None, sampler=[3, 4], **how)) == '13'
    with pytest.raises(ValueError, match='range has no batch: 10 samples, batch_size=11'):
        read_batch(DataLoader(data, batch_size=11, drop_last=True, num_workers=workers))


def test_classes_that_are_a_text(tmp_path, monkeypatch):
    """A data set that works with them gets a warning; a file of names gets none."""
    said = []
    monkeypatch.setattr(datasets, 'log', lambda message, level: said.append(message))
    (tmp_path / 'names.txt').write_text('person\n')

    def check(classes):
        dataset = dict(type='CocoDataset', data_root=str(tmp_path), metainfo=dict(classes=classes))
        datasets.check_datasets(Config(dict(train_dataloader=dict(dataset=dataset))), ('train',))

    for classes in (('person',), ['person'], str(tmp_path / 'names.txt')):
        check(classes)
    assert said == []
    check('person')
    (words,) = said
    assert words.startswith("train_dataloader.dataset: classes='person' is a text")
    assert words.endswith("classes=('person',)")


def test_a_data_set_without_a_length_is_guarded(seg_cfg):
    runner = Runner.from_cfg(seg_cfg())
    datasets.guard_data(runner)
    cfg = dict(batch_size=2, num_workers=0, dataset=Stream(), sampler=None)
    assert len(next(iter(runner.build_dataloader(cfg)))) == 2


def test_annotations_that_lack_an_option_are_not_blamed_on_the_image(tmp_path):
    path = tmp_path / 'image.png'
    cv2.imwrite(str(path), np.zeros((4, 4, 3), np.uint8))

    class LoadAnnotations:
        def __call__(self, data):
            return data['instances'][0]['mask']

    pipeline = datasets.GuardedCompose([LoadAnnotations()])
    words = r"image.png do not fit LoadAnnotations \(KeyError: 'mask'\)"
    with pytest.raises(datasets.DataError, match=words):
        pipeline(dict(img_path=str(path), instances=[{}]))
