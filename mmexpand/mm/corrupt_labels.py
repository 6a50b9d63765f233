"""Training data with random labels, to measure how much a network memorises (Sec. 5.2)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from ..errors import UserTypeError, UserValueError
from .datasets import DataError

LABELS = ('gt_bboxes_labels', 'gt_seg_map', 'gt_label', 'labels')
"""Keys of labels in samples: of boxes, of pixels, of images in mmpretrain and in mmexpand."""


class CorruptLabels:
    """A training set in which a fraction of the labels is random.

    Images, boxes and segments have labels; a segment is a connected region of one class. With
    probability ``fraction``, a label is replaced by a class drawn from all classes, as in Zhang et
    al., "Understanding deep learning requires rethinking generalization", ICLR 2017. The new
    label depends only on the seed, the sample and the label's position in the annotation: labels
    change right after they are loaded, before augmentation, and are the same in every epoch,
    order and worker.

    Ignored pixels stay ignored. An instance's mask has the class of its box.

    Args:
        dataset: config of the data set, or of a wrapper of data sets.
        fraction: probability of a random label, from 0 to 1.
        seed: seed of the random labels.

    Raises:
        TypeError: if ``dataset`` is not a config (a built data set may be shared), or if the data
            set has no pipeline.
        ValueError: if ``fraction`` is out of range, or if the data set has no classes or is a test
            set.
    """

    def __init__(self, dataset: dict, fraction: float, seed: int = 0):
        if not isinstance(dataset, Mapping):
            raise UserTypeError(f'dataset must be a config, got a {type(dataset).__name__}')
        if not 0 <= fraction <= 1:
            raise UserValueError(f'fraction must be from 0 to 1, got {fraction}')
        self.dataset = DATASETS.build(dataset)
        for position, inner in enumerate(_innermost(self.dataset)):
            name = type(inner).__name__
            if not isinstance(inner, BaseDataset):
                raise UserTypeError(
                    f'CorruptLabels requires a BaseDataset of mmengine, got {name}, whose '
                    'pipeline cannot be changed; use a data set that derives from it'
                )
            if inner.test_mode or getattr(inner, 'split', None) in ('val', 'test'):
                raise UserValueError(
                    f'CorruptLabels would corrupt the test data of {name}: wrap training data only'
                )
            if not inner.metainfo.get('classes'):
                raise UserValueError(f'{name} has no classes; set metainfo=dict(classes=...)')
            classes = len(inner.metainfo['classes'])
            _insert(inner, RandomLabels(fraction, classes, (seed, position)))

    @property
    def metainfo(self) -> dict:
        """Return the data set's metainfo."""
        return self.dataset.metainfo

    def update_skip_type_keys(self, keys: Sequence[str]) -> None:
        """Skip transforms of mmdet's ``MultiImageMixDataset``, as YOLOXModeSwitchHook does."""
        self.dataset.update_skip_type_keys(keys)

    def full_init(self) -> None:
        """Load the annotations unless they are loaded."""
        self.dataset.full_init()

    def get_data_info(self, index: int) -> dict:
        """Return an annotation with its original labels, which change when a sample is loaded."""
        return self.dataset.get_data_info(index)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


class RandomLabels:
    """A pipeline step that makes labels random.

    Args:
        fraction: probability of a random label.
        classes: number of classes.
        seed: seed of the random labels, combined with the sample's index.
    """

    def __init__(self, fraction: float, classes: int, seed: tuple[int, ...]):
        self.fraction, self.classes, self.seed = fraction, classes, seed

    def __call__(self, sample: dict) -> dict:
        """Return the sample with random labels.

        Raises:
            DataError: if the sample has no labels.
        """
        found = [key for key in LABELS if key in sample]
        if not found:
            raise DataError(
                f'CorruptLabels finds none of {", ".join(LABELS)} in a sample, which has '
                f'{", ".join(sample)}; load annotations before other steps'
            )
        draws = np.random.default_rng((*self.seed, sample['sample_idx']))
        changed = {key: self._changed(key, sample[key], draws) for key in found}
        return {**sample, **changed}

    def _changed(self, key: str, labels: Any, draws: np.random.Generator) -> Any:
        if key == 'gt_seg_map':
            return self._relabel_segments(labels, draws)
        new = self._redraw(np.atleast_1d(np.asarray(labels)), draws)
        if isinstance(labels, torch.Tensor):
            return torch.from_numpy(new).reshape(labels.shape)
        return new if np.ndim(labels) else int(new[0])

    def _redraw(self, labels: np.ndarray, draws: np.random.Generator) -> np.ndarray:
        chosen = draws.random(len(labels)) < self.fraction
        drawn = draws.integers(self.classes, size=len(labels))
        return np.where(chosen, drawn, labels).astype(labels.dtype)

    def _relabel_segments(self, labels: np.ndarray, draws: np.random.Generator) -> np.ndarray:
        from scipy import ndimage  # Only mmseg has segments, and it depends on scipy.

        new = labels.copy()
        for label in range(self.classes):
            segments, count = ndimage.label(labels == label)
            if count:
                classes = self._redraw(np.full(count + 1, label), draws)
                inside = segments > 0
                new[inside] = classes[segments[inside]]
        return new


def _innermost(dataset: Any) -> Iterator[BaseDataset]:
    inside = [dataset.dataset] if hasattr(dataset, 'dataset') else getattr(dataset, 'datasets', ())
    if not inside:
        yield dataset
    for inner in inside:
        yield from _innermost(inner)


def _insert(dataset: BaseDataset, step: RandomLabels) -> None:
    steps = dataset.pipeline.transforms
    loading = [i for i, one in enumerate(steps) if type(one).__name__.startswith('Load')]
    steps.insert(max(loading, default=-1) + 1, step)
