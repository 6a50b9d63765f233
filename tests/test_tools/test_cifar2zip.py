"""CIFAR's binary archives to the zip that our configs read."""

import io
import tarfile

import numpy as np
import pytest

pytest.importorskip('mmdet')
from mmexpand.models.cifar import ZippedImages
from tests.tools_in_process import run

TOOL = 'dataset_converters/cifar2zip.py'
CLASSES = ('zebra', 'ant')


def write_archive(path, folder, names, parts, num_labels, cut=0):
    """Five images of each part, of classes 0, 1, 0, 1, 0; gives the images by part."""
    rng = np.random.default_rng(0)
    pixels = {part: rng.integers(0, 256, (5, 3072), np.uint8) for part in parts}
    labels = np.full((5, num_labels), 7, np.uint8)
    labels[:, -1] = np.arange(5) % 2
    files = {names: '\n'.join([*CLASSES, '']).encode()}
    for part in parts:
        records = np.concatenate([labels, pixels[part]], 1).tobytes()
        files[part] = records[: len(records) - cut]
    with tarfile.open(path, 'w:gz') as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f'{folder}/{name}')
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return pixels


CIFAR10 = (
    'cifar-10-batches-bin',
    'batches.meta.txt',
    [*(f'data_batch_{i}.bin' for i in range(1, 6)), 'test_batch.bin'],
    1,
)
CIFAR100 = ('cifar-100-binary', 'fine_label_names.txt', ['train.bin', 'test.bin'], 2)


@pytest.mark.parametrize('version', [CIFAR10, CIFAR100], ids=lambda version: version[0])
def test_every_image_and_label(tmp_path, version):
    source, out = tmp_path / 'cifar.tar.gz', tmp_path / 'data/cifar.zip'
    pixels = write_archive(source, *version)
    assert run(TOOL, source, out) == (0, '')
    assert list(out.parent.iterdir()) == [out]
    *train, test = version[2]
    for split, parts in (('trainval', train), ('test', [test])):
        dataset = ZippedImages(ann_file=str(out), split=split)
        assert dataset.metainfo['classes'] == ('ant', 'zebra')
        images = np.concatenate([pixels[part].reshape(-1, 3, 32, 32) for part in parts])
        wanted = [np.arange(5) % 2 == 0 for _ in parts]  # class 0 is the zebra
        order = np.argsort(np.concatenate(wanted), kind='stable')
        assert len(dataset) == len(images)
        for index, place in enumerate(order):
            assert np.array_equal(dataset[index]['inputs'].numpy(), images[place])
            assert dataset[index]['labels'] == np.concatenate(wanted)[place]


@pytest.mark.parametrize(
    ('version', 'cut', 'words'),
    [
        (('cifar-10-batches-py', *CIFAR10[1:]), 0, 'binary version of CIFAR-10 or CIFAR-100'),
        ((*CIFAR10[:2], CIFAR10[2][:-1], 1), 0, "filename 'cifar-10-batches-bin/test_batch.bin'"),
        (CIFAR100, 3, 'its train images are cut off'),
    ],
)
def test_another_archive_is_refused(tmp_path, version, cut, words):
    source, out = tmp_path / 'cifar.tar.gz', tmp_path / 'cifar.zip'
    write_archive(source, *version, cut=cut)
    status, message = run(TOOL, source, out)
    assert status == 1
    assert str(source) in message
    assert words in message
    assert not out.exists()


@pytest.mark.parametrize('harm', ['another kind', 'cut off', 'overwritten', 'missing'])
def test_what_is_no_archive_is_refused(tmp_path, harm):
    source, out = tmp_path / 'cifar.tar.gz', tmp_path / 'cifar.zip'
    write_archive(source, *CIFAR10)
    whole = source.read_bytes()
    middle = len(whole) // 2
    contents = {
        'another kind': b'no archive',
        'cut off': whole[:middle],
        'overwritten': whole[:middle] + bytes(100) + whole[middle + 100 :],
    }
    if harm == 'missing':
        source.unlink()
    else:
        source.write_bytes(contents[harm])
    status, message = run(TOOL, source, out)
    assert status == 1
    assert message.count(str(source)) == 1
    assert not out.exists()
