"""Draw a small detection data set in PASCAL VOC's layout: JPEG files and XML annotations."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
from painting import (
    Canvas,
    blob,
    check_count,
    clouds,
    ellipse,
    random_colour,
    rectangle,
    whole_folder,
    write_image,
)

# An object hidden further than this is marked difficult, or left out.
DIFFICULT_BELOW, MISSING_BELOW = 0.5, 0.2


class Brush:
    """Paints one object: its parts are given in its own box, x and y from 0 to 1."""

    def __init__(self, canvas: Canvas, box: np.ndarray, mirrored: bool):
        self.canvas, self.origin, self.size = canvas, box[:2], box[2:] - box[:2]
        self.mirrored = mirrored
        self.mask = np.zeros(canvas.image.shape[:2], bool)

    def fill(self, points: np.ndarray, colour: np.ndarray, **surface: float) -> None:
        """Paint a part."""
        points = points * (-1, 1) + (1, 0) if self.mirrored else points
        self.mask |= self.canvas.fill(self.origin + points * self.size, colour, **surface)


def paint_boat(brush: Brush, rng: np.random.Generator) -> None:
    hull, sail = random_colour(rng, 20, 140), random_colour(rng, 180, 245)
    brush.fill(rectangle(0.44, 0.0, 0.48, 0.75), random_colour(rng, 30, 90))
    brush.fill(np.array([(0.5, 0.04), (0.5, 0.68), (0.98, 0.68)]), sail, shading=0.5)
    brush.fill(np.array([(0.42, 0.12), (0.42, 0.68), (0.1, 0.68)]), sail * 0.85)
    brush.fill(np.array([(0, 0.74), (1, 0.74), (0.84, 1.0), (0.15, 1.0)]), hull)
    brush.fill(rectangle(0.04, 0.74, 0.96, 0.79), sail * 0.7)


def paint_bottle(brush: Brush, rng: np.random.Generator) -> None:
    glass = np.array([rng.uniform(20, 70), rng.uniform(80, 150), rng.uniform(20, 90)])
    brush.fill(rectangle(0.34, 0.0, 0.66, 0.07), random_colour(rng, 20, 200))
    neck = [(0.36, 0.07), (0.64, 0.07), (0.66, 0.26), (1, 0.42), (1, 1), (0, 1), (0, 0.42)]
    brush.fill(np.array([*neck, (0.34, 0.26)]), glass, shading=0.7)
    brush.fill(rectangle(0.0, 0.52, 1.0, 0.82), random_colour(rng, 150, 240), shading=0.6)
    brush.fill(rectangle(0.12, 0.45, 0.22, 0.97), glass + 90, shading=0.2)


def paint_car(brush: Brush, rng: np.random.Generator) -> None:
    body, window = random_colour(rng, 30, 230), random_colour(rng, 40, 90)
    cabin = np.array([(0.18, 0.42), (0.3, 0.02), (0.72, 0.02), (0.88, 0.42)])
    brush.fill(cabin, body * 0.9)
    brush.fill(np.array([(0.25, 0.4), (0.34, 0.1), (0.5, 0.1), (0.5, 0.4)]), window)
    brush.fill(np.array([(0.54, 0.4), (0.54, 0.1), (0.69, 0.1), (0.8, 0.4)]), window)
    brush.fill(np.array([(0, 0.45), (0.1, 0.38), (0.95, 0.4), (1, 0.84), (0, 0.84)]), body)
    brush.fill(rectangle(0.93, 0.5, 1.0, 0.62), np.array([120.0, 220, 250]), grain=2)
    for x in (0.22, 0.77):
        brush.fill(ellipse(x, 0.8, 0.11, 0.2), np.full(3, 25.0))
        brush.fill(ellipse(x, 0.8, 0.05, 0.09), np.full(3, 170.0))


def paint_person(brush: Brush, rng: np.random.Generator) -> None:
    skin = np.array([120.0, 160, 210]) * rng.uniform(0.45, 1.1)
    shirt, trousers = random_colour(rng, 40, 230), random_colour(rng, 20, 120)
    for x in (0.26, 0.54):
        leg = np.array([(x, 0.5), (x + 0.22, 0.5), (x + 0.19, 0.97), (x + 0.03, 0.97)])
        brush.fill(leg, trousers)
        brush.fill(ellipse(x + 0.13, 0.97, 0.13, 0.03), np.full(3, 30.0))
    for x0, x1 in ((0.2, 0.02), (0.8, 0.98)):
        brush.fill(np.array([(x0, 0.2), (x0, 0.33), (x1, 0.55), (x1, 0.47)]), shirt * 0.8)
        brush.fill(ellipse(x1 + (0.5 - x1) * 0.08, 0.53, 0.06, 0.03), skin)
    torso = np.array([(0.18, 0.19), (0.82, 0.19), (0.75, 0.54), (0.25, 0.54)])
    brush.fill(torso, shirt, shading=0.5)
    brush.fill(ellipse(0.5, 0.1, 0.19, 0.1), skin, shading=0.5)
    brush.fill(ellipse(0.5, 0.05, 0.2, 0.05), random_colour(rng, 10, 80))


def paint_pottedplant(brush: Brush, rng: np.random.Generator) -> None:
    green = np.array([rng.uniform(20, 60), rng.uniform(110, 170), rng.uniform(20, 80)])
    for _ in range(9):
        cx, cy = rng.uniform(0.22, 0.78), rng.uniform(0.17, 0.52)
        brush.fill(blob(cx, cy, 0.22, 0.17, rng), green * rng.uniform(0.6, 1.3), grain=14)
    pot = np.array([rng.uniform(40, 90), rng.uniform(70, 110), rng.uniform(140, 210)])
    brush.fill(np.array([(0.2, 0.64), (0.8, 0.64), (0.7, 1), (0.3, 1)]), pot, shading=0.6)
    brush.fill(rectangle(0.16, 0.6, 0.84, 0.68), pot * 1.15)


def paint_tvmonitor(brush: Brush, rng: np.random.Generator) -> None:
    frame = np.full(3, rng.uniform(15, 60))
    brush.fill(rectangle(0.43, 0.78, 0.57, 0.96), frame * 1.5)
    brush.fill(ellipse(0.5, 0.96, 0.28, 0.04), frame * 1.3)
    brush.fill(rectangle(0, 0, 1, 0.82), frame)
    sky, ground = random_colour(rng, 120, 250), random_colour(rng, 40, 170)
    brush.fill(rectangle(0.05, 0.06, 0.95, 0.5), sky, shading=0.6, grain=3)
    brush.fill(rectangle(0.05, 0.45, 0.95, 0.76), ground, shading=0.6, grain=3)


@dataclass(frozen=True)
class Kind:
    """A class: how it is painted and how wide it is for its height."""

    paint: Callable[[Brush, np.random.Generator], None]
    aspect: tuple[float, float]


KINDS = {
    'boat': Kind(paint_boat, (0.8, 1.2)),
    'bottle': Kind(paint_bottle, (0.28, 0.42)),
    'car': Kind(paint_car, (1.7, 2.4)),
    'person': Kind(paint_person, (0.38, 0.5)),
    'pottedplant': Kind(paint_pottedplant, (0.65, 0.95)),
    'tvmonitor': Kind(paint_tvmonitor, (1.2, 1.6)),
}
"""Classes of VOC that can be drawn."""


@dataclass(frozen=True)
class Annotation:
    """An object as VOC describes it.

    Attributes:
        name: class.
        box: first and last column and row it is seen in: x0, y0, x1, y1, from 0.
        truncated: whether it goes on beyond the image.
        difficult: whether most of it is hidden.
    """

    name: str
    box: tuple[int, int, int, int]
    truncated: bool
    difficult: bool


def paint_background(canvas: Canvas) -> None:
    """Two rough surfaces that meet at a horizon, and a few shapes that are no objects."""
    rng, (height, width) = canvas.rng, canvas.image.shape[:2]
    for top, bottom in ((0, height), (int(height * rng.uniform(0.4, 0.8)), height)):
        mix = clouds((bottom - top, width), rng)[..., None]
        one, other = random_colour(rng, 60, 220), random_colour(rng, 60, 220)
        canvas.image[top:bottom] = one * mix + (0.4 * other + 0.6 * one) * (1 - mix)
    for _ in range(rng.integers(2, 6)):
        cx, cy = rng.uniform(0, width), rng.uniform(0, height)
        rx, ry = rng.uniform(0.02, 0.15, 2) * (width, height)
        shape = (
            blob(cx, cy, rx, ry, rng) if rng.random() < 0.5 else rectangle(cx, cy, cx + rx, cy + ry)
        )
        canvas.fill(shape, random_colour(rng), grain=12)


def random_box(kind: Kind, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    aspect = rng.uniform(*kind.aspect)
    area = rng.uniform(0.06, 0.3) * width * height
    size = np.array([(area * aspect) ** 0.5, (area / aspect) ** 0.5])
    size *= min(1, 0.95 * width / size[0], 0.95 * height / size[1])
    # Up to 15 % of an object may lie outside the image.
    corner = rng.uniform(-0.15 * size, (width, height) - 0.85 * size)
    return np.concatenate([corner, corner + size])


def draw_scene(
    width: int, height: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[Annotation]]:
    """Draw one photograph of one to three objects.

    Returns:
        The image, uint8, BGR, and its annotations.
    """
    canvas = Canvas(width, height, rng)
    paint_background(canvas)
    owner = np.full((height, width), -1)
    drawn = []
    for _ in range(rng.integers(1, 4)):
        name = str(rng.choice(list(KINDS)))
        box = random_box(KINDS[name], width, height, rng)
        ground = ellipse((box[0] + box[2]) / 2, box[3], (box[2] - box[0]) * 0.6, 0.03 * height)
        canvas.fill(ground, np.full(3, 45.0), grain=3)
        brush = Brush(canvas, box, mirrored=rng.random() < 0.5)
        KINDS[name].paint(brush, rng)
        owner[brush.mask] = len(drawn)
        drawn.append((name, box, brush.mask.sum()))
    annotations = []
    for index, (name, box, area) in enumerate(drawn):
        ys, xs = np.nonzero(owner == index)
        seen = len(xs) / max(area, 1)
        if seen < MISSING_BELOW:
            continue
        truncated = bool((box[:2] < 0).any() or (box[2:] > (width, height)).any())
        extent = tuple(int(v) for v in (xs.min(), ys.min(), xs.max(), ys.max()))
        annotations.append(Annotation(name, extent, truncated, seen < DIFFICULT_BELOW))
    image = canvas.photograph(blur=rng.uniform(0.4, 0.9), noise=rng.uniform(2, 6))
    return image, annotations


def write_annotation(path: Path, width: int, height: int, annotations: list[Annotation]) -> None:
    """Write VOC's XML; its coordinates count from 1."""
    root = ElementTree.Element('annotation')

    def add(parent: ElementTree.Element, **values: object) -> None:
        for key, value in values.items():
            ElementTree.SubElement(parent, key).text = str(value)

    add(root, folder='VOC2007', filename=f'{path.stem}.jpg')
    add(ElementTree.SubElement(root, 'source'), database='drawn by mmexpand')
    add(ElementTree.SubElement(root, 'size'), width=width, height=height, depth=3)
    add(root, segmented=0)
    for item in annotations:
        node = ElementTree.SubElement(root, 'object')
        add(node, name=item.name, pose='Unspecified')
        add(node, truncated=int(item.truncated), difficult=int(item.difficult))
        xmin, ymin, xmax, ymax = (value + 1 for value in item.box)
        add(ElementTree.SubElement(node, 'bndbox'), xmin=xmin, ymin=ymin, xmax=xmax, ymax=ymax)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding='unicode')


def draw_voc(
    out: str | os.PathLike,
    num_train: int = 240,
    num_test: int = 60,
    size: tuple[int, int] = (320, 240),
    seed: int = 0,
) -> None:
    """Draw the data set ``out/VOC2007``; the same arguments give the same files.

    As in real annotations, two of the boxes for training have no area.

    Args:
        out: VOC's ``VOCdevkit`` folder; it must not exist, and appears once it is complete.
        num_train: images of trainval, a quarter of which are val.
        num_test: images of test.
        size: width and height of the images.
        seed: the seed of all random choices.

    Raises:
        FileExistsError: if ``out`` exists.
        ValueError: if images are too few or too small.
    """
    check_count('num_train', num_train, 4)
    check_count('num_test', num_test, 1)
    check_count('size', min(size), 64)
    width, height = size
    names = [f'{index + 1:06d}' for index in range(num_train + num_test)]
    train, val = names[: num_train - num_train // 4], names[num_train - num_train // 4 : num_train]
    splits = dict(train=train, val=val, trainval=train + val, test=names[num_train:])
    with whole_folder(out) as folder:
        root = folder / 'VOC2007'
        for name in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
            (root / name).mkdir(parents=True)
        for index, name in enumerate(names):
            rng = np.random.default_rng((seed, index))
            image, annotations = draw_scene(width, height, rng)
            if index in (1, 2):
                x, y = int(rng.integers(width - 9)), int(rng.integers(height - 9))
                flat = (x, y, x + 8 * (index == 1), y + 8 * (index == 2))
                annotations.append(Annotation('bottle', flat, False, False))
            write_image(root / 'JPEGImages' / f'{name}.jpg', image)
            write_annotation(root / 'Annotations' / f'{name}.xml', width, height, annotations)
        for split, members in splits.items():
            (root / 'ImageSets/Main' / f'{split}.txt').write_text('\n'.join(members) + '\n')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', help='folder to make; VOC2007 will be in it')
    parser.add_argument('--num-train', type=int, default=240, help='images of trainval')
    parser.add_argument('--num-test', type=int, default=60, help='images of test')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        default=(320, 240),
        metavar=('W', 'H'),
        help='width and height of the images (default: 320 240)',
    )
    parser.add_argument('--seed', type=int, default=0, help='random seed (default: 0)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cv2.setNumThreads(1)
    draw_voc(args.out, args.num_train, args.num_test, tuple(args.size), args.seed)


if __name__ == '__main__':
    main()
