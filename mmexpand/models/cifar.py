"""Classification of small images: the data set in memory, its augmentation, and its metric."""

import zipfile
from collections.abc import Sequence
from pathlib import PurePosixPath

import cv2
import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserValueError

VAL_IMAGES = 500
"""Images of each class held out of CIFAR-10's training set: the last ones by name."""


@MODELS.register_module()
class CIFARDataPreprocessor(BaseDataPreprocessor):
    """Preprocessor that normalises a batch; in training it also crops and mirrors at random.

    It works on whole batches: image by image it would take longer than the training step.

    Args:
        mean: mean by channel, of images in [0, 255].
        std: standard deviation by channel.
        padding: width of the border of zeros around a normalised image before it is cropped.
    """

    def __init__(self, mean: list[float], std: list[float], padding: int = 4):
        super().__init__()
        self.padding = padding
        self.register_buffer('mean', torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, data: dict, training: bool = False) -> dict:
        """Preprocess ``inputs``, uint8 ``(N, 3, H, W)`` or a list, and ``labels``, ``(N,)``."""
        # Stacked before the copy: copying single images to a GPU takes longer than the step.
        stacked = {key: _stacked(data[key]) for key in ('inputs', 'labels')}
        inputs, labels = self.cast_data(stacked).values()
        inputs = (inputs.float() - self.mean) / self.std
        return dict(inputs=self._augment(inputs) if training else inputs, labels=labels)

    def _augment(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        padded = F.pad(images, (self.padding,) * 4)
        device = images.device
        shift = torch.randint(0, 2 * self.padding + 1, (2, count, 1), device=device)
        rows = torch.arange(height, device=device) + shift[0]
        columns = torch.arange(width, device=device) + shift[1]
        mirrored = torch.rand(count, 1, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
        index = torch.arange(count, device=device)[:, None, None]
        cropped = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
        # Channels last: convolutions of few channels are twice as fast on a CPU.
        return cropped.permute(0, 3, 1, 2)


def _stacked(tensors: Tensor | Sequence[Tensor]) -> Tensor:
    return tensors if isinstance(tensors, Tensor) else torch.stack(list(tensors))


@DATASETS.register_module()
class ZippedImages(BaseDataset):
    """Data set of a zip with ``SPLIT/CLASS/NAME.jpg``, decoded once and kept in memory.

    Args:
        ann_file: the zip, relative to ``data_root``.
        split: 'train', 'val' (the last images of every class of train), 'trainval' or 'test'.
        val_images: number of images of each class in 'val'.
        **kwargs: arguments of ``BaseDataset``. ``metainfo=dict(classes=...)`` selects classes and
            sets their order; otherwise all classes are read, in alphabetical order.

    Raises:
        ValueError: for another split, a class or split without images, or classes smaller than
            ``val_images``.
    """

    def __init__(self, ann_file: str, split: str, val_images: int = VAL_IMAGES, **kwargs):
        if split not in ('train', 'val', 'trainval', 'test'):
            raise UserValueError(
                f"split must be 'train', 'val', 'trainval' or 'test', got {split!r}"
            )
        self.split, self.val_images = split, val_images
        super().__init__(ann_file=ann_file, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Decode all images of the split."""
        with zipfile.ZipFile(self.ann_file) as archive:
            by_class = self._by_class(archive)
            classes = self._metainfo.setdefault('classes', tuple(by_class))
            if absent := [name for name in classes if name not in by_class]:
                raise UserValueError(
                    f'{self.ann_file} has no images of the class {absent[0]!r} in metainfo; its '
                    f'classes are {", ".join(by_class)}'
                )
            chosen = {name: by_class[name] for name in classes}
            return [
                dict(
                    inputs=torch.from_numpy(_decode(archive.read(name))),
                    labels=torch.tensor(label),
                )
                for label, names in enumerate(self._split(chosen))
                for name in names
            ]

    def _by_class(self, archive: zipfile.ZipFile) -> dict[str, list[str]]:
        folder = 'test' if self.split == 'test' else 'train'
        by_class: dict[str, list[str]] = {}
        for name in sorted(archive.namelist()):
            parts = PurePosixPath(name).parts
            if len(parts) == 3 and parts[0] == folder:
                by_class.setdefault(parts[1], []).append(name)
        if not by_class:
            raise UserValueError(f'{self.ann_file} holds no images {folder}/CLASS/NAME')
        return by_class

    def _split(self, by_class: dict[str, list[str]]) -> list[list[str]]:
        if self.split not in ('train', 'val'):
            return list(by_class.values())
        fewest = min(map(len, by_class.values()))
        if not 0 < self.val_images < fewest:
            raise UserValueError(
                f'val_images must be from 1 to {fewest - 1}, so that every class of '
                f'{self.ann_file} is in train and val; got {self.val_images}'
            )
        part = slice(-self.val_images) if self.split == 'train' else slice(-self.val_images, None)
        return [names[part] for names in by_class.values()]

    def full_init(self) -> None:
        """Load the images, which are tensors already."""
        if not self._fully_initialized:
            self.data_list = self.load_data_list()
            if self._indices is not None:
                self.data_list = self._get_unserialized_subset(self._indices)
            self._fully_initialized = True

    def __len__(self) -> int:
        return len(self.data_list)

    def __getitem__(self, index: int) -> dict:
        return self.pipeline(dict(self.data_list[index], sample_idx=index))


def _decode(content: bytes) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    return np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))


@METRICS.register_module()
class TopAccuracy(BaseMetric):
    """Metric 'accuracy': percentage of images whose highest score is at the right class."""

    def process(self, data_batch: dict, data_samples: list[dict]) -> None:
        """Collect whether each prediction is right."""
        self.results += [int(s['pred_label'] == s['gt_label']) for s in data_samples]

    def compute_metrics(self, results: list[int]) -> dict[str, float]:
        """Return the percentage of right predictions."""
        return dict(accuracy=100 * sum(results) / len(results))
