"""Comparison of an exported file with PyTorch's outputs and the framework's predictions."""

import math
from pathlib import Path

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from ..errors import UserRuntimeError
from .decoding import classes_of, predict
from .network import Pixels, RawOutputs, file_images
from .runtimes import Run

CLOSE = 1e-3
"""Tolerance of a detection's score, and of its sides relative to their length."""


class Reference:
    """The compact model in PyTorch on the images of its file.

    Args:
        model: a compact model in eval mode.
        pixels: the pixels that the file takes; None if it takes preprocessed images.
    """

    def __init__(self, model: nn.Module, pixels: Pixels | None):
        self.model = model
        self.pixels = pixels
        self.network = RawOutputs(model, pixels).eval()

    def preprocessed(self, images: Tensor) -> Tensor:
        """Return images preprocessed by the model's data preprocessor instead of ``pixels``."""
        if self.pixels is None:
            return images
        samples = [BaseDataElement() for _ in images]
        data = dict(inputs=list(self.pixels.as_loaded(images)), data_samples=samples)
        return self.model.data_preprocessor(data, False)['inputs']

    def raw_outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the heads."""
        return RawOutputs(self.model)(self.preprocessed(images))

    def raw_error(self, found: list[np.ndarray], images: Tensor) -> float:
        """Return the largest difference of raw outputs, relative to each output's maximum."""
        expected = self.raw_outputs(images)
        return max(_error(e.numpy(), f) for e, f in zip(expected, found, strict=True))

    def agreement(self, found: list[np.ndarray], images: Tensor) -> float:
        """Return the share of predictions equal to the framework's; NaN without predictions."""
        expected = predict(self.model, self.preprocessed(images))
        if 'classes' in expected[0] and found[0].ndim == 4:
            found = [classes_of(self.model.decode_head, torch.from_numpy(found[0])).numpy()]
        counts = np.zeros(2)
        for index, image in enumerate(expected):
            of_file = dict(zip(image, (value[index] for value in found), strict=True))
            of_torch = {name: value.numpy() for name, value in image.items()}
            counts += _agreeing(of_torch, of_file, max(images.shape[-2:]))
        return float(counts[0] / counts[1]) if counts[1] else math.nan


@torch.no_grad()
def compare_file(
    run: Run, model: nn.Module, inputs: Tensor, *, raw: bool = False, pixels: Pixels | None = None
) -> float:
    """Compare a file in a runtime with PyTorch, on one image and on two.

    Args:
        run: runs the file.
        model: the model that was exported, in eval mode.
        inputs: a real image, preprocessed, shape (1, C, H, W).
        raw: whether the file gives raw outputs.
        pixels: the pixels that the file takes; None if it takes preprocessed images.

    Returns:
        The share of predictions equal to the framework's, or the largest error of raw outputs. NaN
        if nothing was detected.
    """
    reference = Reference(model, pixels)
    images = batches(file_images(inputs, pixels), dynamic_size=False)
    if raw:
        return max(reference.raw_error(run(batch.numpy()), batch) for batch in images)
    shares = [reference.agreement(run(batch.numpy()), batch) for batch in images]
    return min((share for share in shares if not math.isnan(share)), default=math.nan)


def check_error(names: str, error: float, tolerance: float, out: Path) -> None:
    """Check that the raw outputs of a file equal PyTorch's.

    Args:
        names: names of both sides of the comparison.
        error: the largest error, relative to the largest output.
        tolerance: the largest error allowed.
        out: the file, for the message.

    Raises:
        RuntimeError: if the error is larger, or is not a number.
    """
    if not error <= tolerance:
        raise UserRuntimeError(
            f'{names} differ by {error:.3g} of the largest output, allowed {tolerance:.3g}; {out} '
            'was not written'
        )


def detections(predicted: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a file's detections in one image, without padding."""
    real = predicted['labels'] >= 0
    return {name: value[real] for name, value in predicted.items()}


def _agreeing(expected: dict, found: dict, size: int) -> tuple[int, int]:
    """Return the number of predictions with a partner on the other side, and the number of all."""
    if 'classes' in expected:
        same = expected['classes'] == found['classes']
        return int(same.sum()), same.size
    expected = {name: value[: len(found['labels'])] for name, value in expected.items()}
    found = detections(found)
    # YOLOX does not clip boxes: some are many times as large as the image.
    sizes = np.maximum(np.abs(expected['boxes']).max(-1, initial=0), size)[:, None]
    distance = np.abs(expected['boxes'][:, None] - found['boxes'][None]).max(-1, initial=0) / sizes
    scores = np.abs(expected['scores'][:, None] - found['scores'][None])
    labels = expected['labels'][:, None] == found['labels'][None]
    same = labels & (np.maximum(distance, scores) <= CLOSE)
    return int(same.any(0).sum() + same.any(1).sum()), sum(same.shape)


def _error(expected: np.ndarray, found: np.ndarray) -> float:
    if expected.shape != found.shape:
        return float('inf')
    scale = np.abs(expected).max()
    error = np.abs(expected.astype(np.float64) - found).max() / (scale if scale > 0 else 1)
    return float(error) if np.isfinite(error) else float('inf')


def batches(images: Tensor, dynamic_size: bool) -> list[Tensor]:
    """Return a batch of one image, of two different images, and optionally of other sizes."""
    found = [images, torch.cat([images, images.flip(-1)])]
    if dynamic_size:
        # Doubled, so that the network can still divide the size.
        found += [images.repeat(1, 1, 1, 2), images.repeat(1, 1, 2, 1)]
    return found
