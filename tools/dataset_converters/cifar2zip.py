"""Convert CIFAR-10 or CIFAR-100, binary version, to the zip of images that our configs read.

python tools/dataset_converters/cifar2zip.py cifar-10-binary.tar.gz data/cifar10/cifar10.zip
"""

import argparse
import tarfile
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
from mmengine.utils import track_iter_progress

from mmexpand.files import written_whole
from mmexpand.mm.contraction import check_writable

PIXELS = 3 * 32 * 32
# By folder in the archive: bytes of labels before an image, of which the last one counts; the file
# with the names of the classes; the files with images.
VERSIONS = {
    'cifar-10-batches-bin': (
        1,
        'batches.meta.txt',
        {'train': [f'data_batch_{i}.bin' for i in range(1, 6)], 'test': ['test_batch.bin']},
    ),
    'cifar-100-binary': (
        2,
        'fine_label_names.txt',
        {'train': ['train.bin'], 'test': ['test.bin']},
    ),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('src', help='cifar-10-binary.tar.gz or cifar-100-binary.tar.gz')
    parser.add_argument('dst', help='zip to write: SPLIT/CLASS/NUMBER.png')
    return parser.parse_args()


def read(src: str) -> tuple[str, dict[str, bytes]]:
    """Return the folder in the archive, and its files by name, without writing them to disk."""
    with tarfile.open(src) as archive:
        for folder, (_, names, splits) in VERSIONS.items():
            wanted = [names, *splits['train'], *splits['test']]
            if f'{folder}/{names}' in archive.getnames():
                return folder, {n: archive.extractfile(f'{folder}/{n}').read() for n in wanted}
    raise ValueError(
        f'no class names in {" or ".join(VERSIONS)}: take the binary version of '
        'CIFAR-10 or CIFAR-100 (the one for Python is pickles, which can run code)'
    )


def images(src: str) -> list[tuple[str, np.ndarray]]:
    """Yield names ``SPLIT/CLASS/NUMBER.png`` and images, ``(32, 32, 3)`` of uint8, BGR."""
    folder, files = read(src)
    num_labels, names, splits = VERSIONS[folder]
    classes = files[names].decode().split()
    found = []
    for split, parts in splits.items():
        content = b''.join(files[part] for part in parts)
        if len(content) % (num_labels + PIXELS):
            raise ValueError(f'its {split} images are cut off')
        records = np.frombuffer(content, np.uint8).reshape(-1, num_labels + PIXELS)
        for number, record in enumerate(records):
            image = record[num_labels:].reshape(3, 32, 32)[::-1].transpose(1, 2, 0)
            found.append((f'{split}/{classes[record[num_labels - 1]]}/{number:05}.png', image))
    return found


def main() -> None:
    args = parse_args()
    try:
        check_writable(Path(args.dst).parent, 'DST')
        found = images(args.src)
    except PermissionError as error:
        raise SystemExit(f'cifar2zip.py: {error}') from None
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zlib.error) as error:
        words = getattr(error, 'strerror', None) or error
        raise SystemExit(f'cifar2zip.py: {args.src}: {words}') from None
    with written_whole(args.dst) as temporary, zipfile.ZipFile(temporary, 'w') as archive:
        for name, image in track_iter_progress(found):
            archive.writestr(name, cv2.imencode('.png', image)[1].tobytes())
    print(f'\n{args.dst}: {len(found)} images')


if __name__ == '__main__':
    main()
