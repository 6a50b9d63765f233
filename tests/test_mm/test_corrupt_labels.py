"""Random labels: as many as asked for, the same for ever, whole boxes and segments, in training."""

import sys
import zipfile
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from scipy import ndimage
from torch.utils.data import DataLoader

from mmexpand.mm.compact_config import make_compact_config
from mmexpand.mm.corrupt_labels import RandomLabels
from mmexpand.mm.datasets import DataError, check_datasets
from tests.conftest import draw_street

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools/demo'))

from draw_voc import draw_voc

CLASSES = 10


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """A thousand images of ten classes."""
    path = tmp_path_factory.mktemp('zip') / 'images.zip'
    content = cv2.imencode('.png', np.zeros((4, 4, 3), np.uint8))[1].tobytes()
    with zipfile.ZipFile(path, 'w') as archive:
        for label in range(CLASSES):
            for index in range(100):
                archive.writestr(f'train/{label}/{index:03d}.png', content)
            archive.writestr(f'test/{label}/0.png', content)
    return path


def classifier_data(images, split='trainval'):
    cfg = dict(type='ZippedImages', data_root=str(images.parent), ann_file=images.name)
    return dict(cfg, split=split, val_images=10)


def corrupted(dataset, fraction, **more):
    return DATASETS.build(dict(type='CorruptLabels', dataset=dataset, fraction=fraction, **more))


def labels_of(dataset) -> np.ndarray:
    return np.array([int(dataset[i]['labels']) for i in range(len(dataset))])


@pytest.mark.parametrize('fraction', [0, 0.2, 0.5, 0.8, 1])
def test_as_many_as_asked_for(images, fraction):
    """A tenth of the drawn labels get their own class again."""
    clean = labels_of(DATASETS.build(classifier_data(images)))
    changed = clean != labels_of(corrupted(classifier_data(images), fraction))
    share = fraction * (1 - 1 / CLASSES)
    deviation = np.sqrt(share * (1 - share) / len(clean))
    assert abs(changed.mean() - share) <= 3 * deviation


def test_all_classes_are_drawn_alike(images):
    counts = np.bincount(labels_of(corrupted(classifier_data(images), 1)), minlength=CLASSES)
    assert len(counts) == CLASSES
    # Chi-square with 9 degrees of freedom: 27.9 at one in a thousand.
    assert ((counts - 100) ** 2 / 100).sum() < 27.9


def test_labels_depend_on_nothing_but_the_seed(images):
    data = corrupted(classifier_data(images), 0.5)
    first = labels_of(data)
    assert np.array_equal(labels_of(data), first)
    backwards = [int(data[i]['labels']) for i in reversed(range(len(data)))]
    assert backwards[::-1] == first.tolist()
    loader = DataLoader(data, 50, num_workers=2)
    assert torch.cat([batch['labels'] for batch in loader]).tolist() == first.tolist()
    np.random.seed(7)
    assert np.array_equal(labels_of(corrupted(classifier_data(images), 0.5)), first)
    assert not np.array_equal(labels_of(corrupted(classifier_data(images), 0.5, seed=1)), first)


def test_the_data_set_inside_keeps_its_labels(images):
    data = corrupted(classifier_data(images), 1)
    kept = [int(item['labels']) for item in data.dataset.data_list]
    assert kept == labels_of(DATASETS.build(classifier_data(images))).tolist()
    assert len(data) == 1000
    assert data.metainfo['classes'] == tuple(map(str, range(CLASSES)))


def test_data_sets_that_are_put_together_are_drawn_apart(images):
    both = dict(type='ConcatDataset', datasets=[classifier_data(images)] * 2)
    labels = labels_of(corrupted(both, 1))
    assert (labels[:1000] == labels[1000:]).mean() < 0.2


@pytest.fixture(scope='module')
def voc(tmp_path_factory):
    root = tmp_path_factory.mktemp('boxes') / 'voc'
    draw_voc(root, num_train=20, num_test=2, size=(200, 120))
    return root


def detector_data(voc, **more):
    steps = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackDetInputs'),
    ]
    files = dict(ann_file='VOC2007/ImageSets/Main/trainval.txt', data_root=str(voc))
    prefix = dict(sub_data_root='VOC2007/')
    return dict(type='VOCDataset', data_prefix=prefix, pipeline=steps, **files, **more)


def boxes_of(dataset):
    samples = [dataset[i]['data_samples'].gt_instances for i in range(len(dataset))]
    return [s.bboxes.tensor.shape for s in samples], torch.cat([s.labels for s in samples])


def test_boxes_keep_their_places_and_get_classes(voc):
    init_default_scope('mmdet')
    clean_boxes, clean = boxes_of(DATASETS.build(detector_data(voc)))
    data = corrupted(detector_data(voc), 0.5)
    boxes, labels = boxes_of(data)
    assert boxes == clean_boxes
    assert labels.dtype == clean.dtype
    share = float((labels != clean).float().mean())
    assert 0.2 < share < 0.75
    # Images are mirrored at random, labels are the same.
    assert torch.equal(boxes_of(data)[1], labels)
    assert set(labels.tolist()) <= set(range(20))


def segmentor_data(street):
    steps = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackSegInputs'),
    ]
    prefix = dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')
    return dict(type='CityscapesDataset', data_root=str(street), data_prefix=prefix, pipeline=steps)


def masks_of(dataset):
    return [dataset[i]['data_samples'].gt_sem_seg.data[0].numpy() for i in range(len(dataset))]


def test_segments_are_relabelled_as_a_whole(tmp_path):
    init_default_scope('mmseg')
    street = draw_street(tmp_path)
    clean = masks_of(DATASETS.build(segmentor_data(street)))
    data = corrupted(segmentor_data(street), 1, seed=3)
    found = masks_of(data)
    assert any((a != b).any() for a, b in zip(clean, found, strict=True))
    for before, after in zip(clean, found, strict=True):
        sides = (before == 13).sum(), (before == 0).sum()
        # The draws may give both the same class; mirrored or not, the sizes are those.
        counts = sorted(np.unique(after, return_counts=True)[1].tolist())
        assert counts in (sorted(sides), [before.size])
    classes = [sorted(np.unique(mask).tolist()) for mask in found]
    assert [sorted(np.unique(mask).tolist()) for mask in masks_of(data)] == classes


def test_regions_apart_are_segments_of_their_own():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (60, 60)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
    labels[:8] = 255
    out = RandomLabels(0.5, 3, (0, 0))(dict(gt_seg_map=labels, sample_idx=0))['gt_seg_map']
    assert out.dtype == np.uint8
    assert (out[:8] == 255).all()
    assert (out[8:] < 3).all()
    changed = total = 0
    for label in range(3):
        segments, count = ndimage.label(labels == label)
        values = [np.unique(out[segments == i + 1]) for i in range(count)]
        assert all(len(value) == 1 for value in values)
        changed += sum(int(value[0]) != label for value in values)
        total += count
    assert total > 300
    assert changed / total == pytest.approx(0.5 * 2 / 3, abs=3 * np.sqrt(2 / 9 / total))


def test_labels_of_mmpretrain():
    step = RandomLabels(1, 1000, (0, 0))
    single = step(dict(gt_label=3, sample_idx=0))['gt_label']
    assert type(single) is int
    assert single != 3
    several = step(dict(gt_label=[3, 4], sample_idx=0))['gt_label']
    assert len(several) == 2


def test_data_to_evaluate_on_is_refused(images, voc, seg_cfg):
    for split in ('val', 'test'):
        with pytest.raises(ValueError, match='would corrupt the test data of ZippedImages'):
            corrupted(classifier_data(images, split), 0.2)
    init_default_scope('mmdet')
    with pytest.raises(ValueError, match='would corrupt the test data of VOCDataset'):
        corrupted(detector_data(voc, test_mode=True), 0.2)
    cfg = seg_cfg()
    cfg.val_dataloader.dataset = dict(
        type='CorruptLabels', dataset=cfg.val_dataloader.dataset, fraction=0.2
    )
    check_datasets(cfg, ('train',))
    with pytest.raises(DataError, match=r'val_dataloader\.dataset has CorruptLabels'):
        check_datasets(cfg, ('train', 'val'))
    # The training error is measured on the training set with its random labels.
    cfg.train_dataloader.dataset = cfg.val_dataloader.dataset
    check_datasets(cfg, ('train', 'val'))


def test_bad_arguments(images):
    with pytest.raises(ValueError, match=r'fraction must be from 0 to 1, got 20'):
        corrupted(classifier_data(images), 20)
    with pytest.raises(TypeError, match='dataset must be a config, got a ZippedImages'):
        corrupted(DATASETS.build(classifier_data(images)), 0.2)
    with pytest.raises(DataError, match=r'finds none of .* in a sample, which has sample_idx, img'):
        RandomLabels(0.5, 3, (0, 0))(dict(sample_idx=0, img=None))


def test_a_training(seg_cfg):
    """The network is given random labels to learn, and right ones to be evaluated on."""
    cfg = seg_cfg()
    cfg.train_dataloader.dataset = dict(
        type='CorruptLabels', dataset=cfg.train_dataloader.dataset, fraction=1.0
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    seen = {label for mask in masks_of(runner.train_dataloader.dataset) for label in mask.flat}
    assert not seen <= {0, 13}
    assert {label for mask in masks_of(runner.val_dataloader.dataset) for label in mask.flat} == {
        0,
        13,
    }
    compact = Config.fromfile(Path(cfg.work_dir) / 'compact_config.py')
    assert compact.train_dataloader.dataset.type == 'CityscapesDataset'
    assert 'CorruptLabels' not in make_compact_config(cfg).pretty_text


def test_hooks_that_switch_the_data_set(images):
    """mmdet's YOLOXModeSwitchHook reaches the data set inside; PipelineSwitchHook cannot."""
    dataset = corrupted(classifier_data(images), 0.5)
    dataset.dataset.update_skip_type_keys = kept = mock.Mock()
    dataset.update_skip_type_keys(['Mosaic'])
    kept.assert_called_once_with(['Mosaic'])
    loader = dict(dataset=dict(type='CorruptLabels', dataset=classifier_data(images), fraction=0.5))
    cfg = Config(dict(train_dataloader=loader, custom_hooks=[dict(type='PipelineSwitchHook')]))
    with pytest.raises(DataError, match='PipelineSwitchHook cannot change'):
        check_datasets(cfg, ('train',))
    check_datasets(Config(dict(cfg, custom_hooks=[])), ('train',))
