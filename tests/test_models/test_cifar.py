"""Images in a zip, their augmentation by batches, and their metric."""

import zipfile

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, METRICS, MODELS

MEAN, STD = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]


@pytest.fixture(scope='module')
def archive(tmp_path_factory):
    """Five images in train and two in test, of each of two classes; PNG, so that none is lossy."""
    path = tmp_path_factory.mktemp('zip') / 'images.zip'
    with zipfile.ZipFile(path, 'w') as file:
        # Not in order: splits go by name.
        for split, count in (('test', 2), ('train', 5)):
            for label, name in ((1, 'dog'), (0, 'cat')):
                for index in reversed(range(count)):
                    image = np.full((8, 8, 3), (10 * index, 50, 200 * label), np.uint8)
                    encoded = cv2.imencode('.png', image)[1].tobytes()
                    file.writestr(f'{split}/{name}/{index:04d}.png', encoded)
        file.writestr('README.txt', 'no image')
    return path


def dataset(archive, split, **kwargs):
    kwargs = {'val_images': 2, **kwargs}
    cfg = dict(type='ZippedImages', data_root=str(archive.parent), ann_file=archive.name)
    return DATASETS.build(dict(cfg, split=split, **kwargs))


def content(data):
    """Return the class and the number (in the blue channel) of every image."""
    return [(int(d['labels']), int(d['inputs'][2, 0, 0]) // 10) for d in data]


@pytest.mark.parametrize(
    ('split', 'numbers'),
    [('train', [0, 1, 2]), ('val', [3, 4]), ('trainval', [0, 1, 2, 3, 4]), ('test', [0, 1])],
)
def test_splits_are_balanced_and_go_by_name(archive, split, numbers):
    data = dataset(archive, split)
    assert content(data) == [(label, number) for label in (0, 1) for number in numbers]
    assert data.metainfo['classes'] == ('cat', 'dog')
    image = data[len(data) - 1]['inputs']
    assert image.dtype == torch.uint8
    assert image.shape == (3, 8, 8)
    # OpenCV's blue is last, red first.
    assert image[:, 0, 0].tolist() == [200, 50, 10 * numbers[-1]]


def test_a_part_of_the_images(archive):
    whole = content(dataset(archive, 'trainval'))
    assert content(dataset(archive, 'trainval', indices=3)) == whole[:3]
    assert content(dataset(archive, 'trainval', indices=[6, 1])) == [whole[6], whole[1]]


def test_metainfo_selects_classes_and_their_order(archive):
    data = dataset(archive, 'train', metainfo=dict(classes=('dog',)))
    assert content(data) == [(0, 0), (0, 1), (0, 2)]
    assert all(item['inputs'][0, 0, 0] == 200 for item in data)  # Red is drawn for dogs only.
    both = dataset(archive, 'train', metainfo=dict(classes=('dog', 'cat')))
    assert [int(item['labels']) for item in both if item['inputs'][0, 0, 0] == 200] == [0, 0, 0]
    message = r"no images of the class 'cow' in metainfo; its classes are cat, dog"
    with pytest.raises(ValueError, match=message):
        dataset(archive, 'train', metainfo=dict(classes=('dog', 'cow')))


def test_bad_splits_are_refused(archive, tmp_path):
    with pytest.raises(ValueError, match=r"split must be 'train', 'val'.*got 'dev'"):
        dataset(archive, 'dev')
    for split in ('train', 'val'):
        for count in (0, 5):
            with pytest.raises(ValueError, match=f'val_images must be from 1 to 4.*got {count}'):
                dataset(archive, split, val_images=count)
    empty = tmp_path / 'empty.zip'
    with zipfile.ZipFile(empty, 'w') as file:
        file.writestr('cat/0.png', 'in no split')
    with pytest.raises(ValueError, match=r'empty\.zip holds no images train/CLASS/NAME'):
        dataset(empty, 'train')


def preprocessor(**kwargs):
    return MODELS.build(dict(type='CIFARDataPreprocessor', mean=MEAN, std=STD, **kwargs))


def batch(count=64):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return dict(inputs=list(images), labels=[torch.tensor(i % 10) for i in range(count)])


def test_evaluation_only_normalises():
    data = batch()
    out = preprocessor()(data, training=False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(out['inputs'], (torch.stack(data['inputs']) - mean) / std)
    assert out['labels'].tolist() == [i % 10 for i in range(64)]


def test_every_augmented_image_is_one_of_the_crops():
    """Each of 5 x 5 shifts, mirrored or not, of the padded image, and not always the same."""
    plain = preprocessor()(batch())['inputs']
    torch.manual_seed(0)
    augmented = preprocessor(padding=2)(batch(), training=True)['inputs']
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2))
    used = set()
    for image, source in zip(augmented, padded, strict=True):
        fits = [
            (row, column, mirrored)
            for row in range(5)
            for column in range(5)
            for mirrored in (False, True)
            if torch.equal(image, _crop(source, row, column, mirrored))
        ]
        assert len(fits) == 1
        used.update(fits)
    assert {row for row, _, _ in used} == {column for _, column, _ in used} == set(range(5))
    assert {mirrored for _, _, mirrored in used} == {False, True}


def _crop(image, row, column, mirrored):
    crop = image[:, row : row + 8, column : column + 8]
    return crop.flip(2) if mirrored else crop


def test_augmentation_follows_the_seed():
    def augment(seed):
        torch.manual_seed(seed)
        return preprocessor()(batch(), training=True)['inputs']

    assert torch.equal(augment(0), augment(0))
    assert not torch.equal(augment(0), augment(1))


def test_accuracy_is_in_percent():
    metric = METRICS.build(dict(type='TopAccuracy'))
    for found, right in (([1, 2, 0], [1, 2, 3]), ([5], [5])):
        samples = [
            dict(pred_label=torch.tensor(p), gt_label=torch.tensor(t))
            for p, t in zip(found, right, strict=True)
        ]
        metric.process({}, samples)
    assert metric.evaluate(4) == {'accuracy': 75.0}
