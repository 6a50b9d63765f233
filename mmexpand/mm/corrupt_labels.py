"""Training data with random labels, to see what a network memorises (Sec. 5.2)."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from ..errors import UserTypeError, UserValueError
from .datasets import DataError

LABELS = ('gt_bboxes_labels', 'gt_seg_map', 'gt_label', 'labels')
"""Where samples hold classes: of boxes, of pixels, of an image in mmpretrain and in ours."""


class CorruptLabels:
    """A training set of which a share of the labels is random.

    A label is that of an image, of a box, or of a segment: a connected region of one class, which
    is relabelled as a whole. Each is drawn with probability ``fraction``, and then gets a class
    drawn from all, its own among them, as in Zhang et al., "Understanding deep learning requires
    rethinking generalization", ICLR 2017. What it gets depends on the seed, the sample and its
    place in the annotation alone: labels are changed where they have been loaded, before any
    augmentation, and are the same in every epoch, order and worker.

    Pixels that are ignored stay so. Of instances' masks, the class is that of their box.

    Args:
        dataset: config of the data set, or of a wrapper of data sets.
        fraction: of the labels, from 0 to 1.
        seed: of the draws.

    Raises:
        TypeError: if ``dataset`` is no config, since others may use one that is built, or has no
            pipeline.
        ValueError: for another fraction, a data set without classes, or one to test with.
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
                    f'{name} is no data set of mmengine, whose pipeline could be changed'
                )
            if inner.test_mode or getattr(inner, 'split', None) in ('val', 'test'):
                raise UserValueError(
                    f'{name} is there to test with, which random labels are no use for: put '
                    'CorruptLabels around training data alone'
                )
            if not inner.metainfo.get('classes'):
                raise UserValueError(
                    f'{name} has no classes: name them, metainfo=dict(classes=...)'
                )
            classes = len(inner.metainfo['classes'])
            _insert(inner, RandomLabels(fraction, classes, (seed, position)))

    @property
    def metainfo(self) -> dict:
        """The data set's."""
        return self.dataset.metainfo

    def full_init(self) -> None:
        """Load the annotations, if that is still to be done."""
        self.dataset.full_init()

    def get_data_info(self, index: int) -> dict:
        """An annotation, its labels as they are: they are changed when a sample is loaded."""
        return self.dataset.get_data_info(index)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


class RandomLabels:
    """The step of a pipeline that changes labels.

    Args:
        fraction: of the labels.
        classes: how many there are.
        seed: that goes into every draw.
    """

    def __init__(self, fraction: float, classes: int, seed: tuple[int, ...]):
        self.fraction, self.classes, self.seed = fraction, classes, seed

    def __call__(self, sample: dict) -> dict:
        """The sample with other labels.

        Raises:
            DataError: if it has none.
        """
        found = [key for key in LABELS if key in sample]
        if not found:
            raise DataError(
                f'CorruptLabels finds no labels in a sample, which holds {", ".join(sample)}; it '
                f'knows {", ".join(LABELS)}: load annotations before other steps'
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
        from scipy import ndimage  # mmseg, which alone has segments, depends on it.

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
