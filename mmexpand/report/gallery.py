"""Predictions beside the ground truth, with the error of each picture."""

import base64
import io
from collections import Counter
from colorsys import hls_to_rgb
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

WIDTH = 360
"""Largest width of an image in the page, in pixels."""

MATCH_IOU = 0.5
MIN_SCORE = 0.3


@dataclass(frozen=True)
class Boxes:
    """The boxes of an image.

    Attributes:
        corners: shape (N, 4): left, top, right and bottom, in pixels.
        labels: shape (N,): indexes of classes.
        scores: shape (N,); None for the ground truth.
    """

    corners: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None


@dataclass(frozen=True)
class DrawnBox:
    """A box as the page draws it.

    Attributes:
        corners: left, top, right, bottom.
        label: index of its class.
        text: the text beside it.
        right: whether it matches a box on the other side.
    """

    corners: tuple[float, float, float, float]
    label: int
    text: str
    right: bool


@dataclass(frozen=True)
class Side:
    """The overlay of one side: boxes, or a mask as a data URI."""

    boxes: list[DrawnBox] = field(default_factory=list)
    mask: str = ''


@dataclass(frozen=True)
class Picture:
    """One image of the gallery.

    Attributes:
        name: the name of the file.
        image: the image as a data URI.
        width: width of the image in which boxes are measured.
        height: its height.
        truth: the annotations.
        prediction: the output of the network.
        error: share of wrong decisions, over all classes.
        errors: the same by class, for annotated and predicted classes.
    """

    name: str
    image: str
    width: int
    height: int
    truth: Side
    prediction: Side
    error: float
    errors: dict[int, float]


@dataclass(frozen=True)
class Gallery:
    """Pictures and the names of their classes.

    Attributes:
        pictures: in the order of the data set.
        classes: names.
        colors: RGB of each class.
        about: a sentence that names the network and the data.
        measure: a sentence that defines the error.
    """

    pictures: list[Picture]
    classes: list[str]
    colors: list[tuple[int, int, int]]
    about: str
    measure: str

    @property
    def present(self) -> list[int]:
        """Return the classes that the pictures show."""
        return sorted({label for picture in self.pictures for label in picture.errors})


MEASURES = {
    'boxes': (
        'The error is the share of false and missed boxes (dashed) among false, missed and found '
        f'boxes; a box is found with an IoU of at least {MATCH_IOU:g} and a score of at least '
        f'{MIN_SCORE:g}.'
    ),
    'masks': 'The error is 1 - IoU of the pixels, over all classes or for the chosen class.',
}


def boxes_picture(
    name: str,
    image: np.ndarray,
    truth: Boxes,
    prediction: Boxes,
    classes: list[str],
    ignored: Boxes | None = None,
) -> Picture:
    """Return the picture of a detection.

    Args:
        name: the name of the image.
        image: RGB, shape (H, W, 3), 8 bits.
        truth: the annotated boxes.
        prediction: boxes in any order; those with a low score are left out.
        classes: names.
        ignored: boxes that count neither as found nor as missed.
    """
    order = np.argsort(-prediction.scores, kind='stable')
    order = order[prediction.scores[order] >= MIN_SCORE]
    said = Boxes(prediction.corners[order], prediction.labels[order], prediction.scores[order])
    partners = match_boxes(truth, said)
    if ignored is not None:
        # A box that is ignored may be found several times.
        excused = [
            bool((_ious(ignored.corners, corners)[ignored.labels == label] >= MATCH_IOU).any())
            for corners, label in zip(said.corners, said.labels, strict=True)
        ]
        kept = [i for i, partner in enumerate(partners) if partner is not None or not excused[i]]
        said = Boxes(said.corners[kept], said.labels[kept], said.scores[kept])
        partners = [partners[index] for index in kept]
    rights = np.array([partner is not None for partner in partners], bool)
    hits = np.isin(np.arange(len(truth.labels)), [p for p in partners if p is not None])
    found, false = Counter(said.labels[rights].tolist()), Counter(said.labels[~rights].tolist())
    missed = Counter(truth.labels[~hits].tolist())
    counts = {
        label: (found[label], false[label], missed[label]) for label in found | false | missed
    }
    names = [classes[label] for label in truth.labels]
    pairs = zip(said.labels, said.scores, strict=True)
    scored = [f'{classes[label]} {score:.2f}' for label, score in pairs]
    height, width = image.shape[:2]
    sides = Side(_drawn(truth, hits, names)), Side(_drawn(said, rights, scored))
    return Picture(name, _jpeg(image), width, height, *sides, *_errors(counts))


def match_boxes(truth: Boxes, prediction: Boxes) -> list[int | None]:
    """Return the box that each prediction finds, first come first served; None if false."""
    free = np.ones(len(truth.labels), bool)
    partners: list[int | None] = []
    for corners, label in zip(prediction.corners, prediction.labels, strict=True):
        overlaps = np.where(free & (truth.labels == label), _ious(truth.corners, corners), 0)
        best = int(overlaps.argmax()) if overlaps.size else 0
        if overlaps.size and overlaps[best] >= MATCH_IOU:
            free[best] = False
            partners.append(best)
        else:
            partners.append(None)
    return partners


def _ious(many: np.ndarray, one: np.ndarray) -> np.ndarray:
    sides = np.minimum(many[:, 2:], one[2:]) - np.maximum(many[:, :2], one[:2])
    inside = sides.clip(0).prod(1)
    areas = (many[:, 2:] - many[:, :2]).prod(1) + (one[2:] - one[:2]).prod()
    return inside / np.maximum(areas - inside, 1e-9)


def _drawn(boxes: Boxes, rights: np.ndarray, texts: list[str]) -> list[DrawnBox]:
    corners = boxes.corners.round(1).tolist()
    rows = zip(corners, boxes.labels.tolist(), texts, rights.tolist(), strict=True)
    return [DrawnBox(tuple(box), label, text, right) for box, label, text, right in rows]


def mask_picture(
    name: str, image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, colors: list
) -> Picture:
    """Return the picture of a segmentation.

    Args:
        name: the name of the image.
        image: RGB, shape (H, W, 3), 8 bits.
        truth: indexes of classes, shape (H, W); pixels of unknown classes do not count.
        prediction: indexes of classes, shape (H, W).
        colors: RGB of every class.
    """
    if truth.shape != prediction.shape:
        resized = Image.fromarray(truth.astype(np.uint8))
        truth = np.asarray(resized.resize(prediction.shape[::-1], Image.Resampling.NEAREST))
    known = truth < len(colors)
    ours, theirs = truth[known].astype(int), prediction[known].astype(int)
    size = len(colors)
    hits = np.bincount(ours[ours == theirs], minlength=size)
    false = np.bincount(theirs, minlength=size)[:size] - hits  # A head may have more classes.
    missed = np.bincount(ours, minlength=size) - hits
    counts = {
        label: (int(hits[label]), int(false[label]), int(missed[label]))
        for label in range(size)
        if hits[label] + false[label] + missed[label]
    }
    height, width = image.shape[:2]
    sides = [Side(mask=_png(mask, colors)) for mask in (truth, prediction)]
    return Picture(name, _jpeg(image), width, height, *sides, *_errors(counts))


def _errors(counts: dict[int, tuple[int, int, int]]) -> tuple[float, dict[int, float]]:
    """Return errors by class from right, false and missed counts."""
    errors = {label: 1 - count[0] / sum(count) for label, count in sorted(counts.items())}
    total = sum(map(sum, counts.values()))
    right = sum(count[0] for count in counts.values())
    return (1 - right / total if total else 0.0), errors


def class_colors(palette: list | None, count: int) -> list[tuple[int, int, int]]:
    """Return the RGB of every class: the data set's, or else distinct hues."""
    if isinstance(palette, (list, tuple)) and len(palette) >= count:
        return [tuple(map(int, color)) for color in palette[:count]]
    # Steps of the golden ratio: neighbours are far from each other.
    colors = (hls_to_rgb(index * 0.618 % 1, 0.45, 0.8) for index in range(count))
    return [tuple(round(255 * value) for value in color) for color in colors]


def _jpeg(image: np.ndarray) -> str:
    small = Image.fromarray(image)
    small.thumbnail((WIDTH, small.height), Image.Resampling.LANCZOS)
    return _data_uri(small, 'JPEG', quality=80)


def _png(mask: np.ndarray, colors: list) -> str:
    small = Image.fromarray(mask.astype(np.uint8))
    small.thumbnail((WIDTH, small.height), Image.Resampling.NEAREST)
    # All 256 entries: pixels of unknown classes are transparent.
    small.putpalette(bytes(value for color in colors for value in color).ljust(768, b'\0'))
    seen = bytes([255] * len(colors)).ljust(256, b'\0')
    return _data_uri(small, 'PNG', transparency=seen)


def _data_uri(image: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **options)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}'
