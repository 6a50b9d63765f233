"""Draw a small segmentation data set in Cityscapes' layout: photographs, polygons, label images.

The label images are made from the polygons by cityscapesscripts.
"""

import argparse
import itertools
import json
import os
from pathlib import Path

import cv2
import numpy as np
from cityscapesscripts.preparation.json2labelImg import json2labelImg
from painting import (
    Canvas,
    Points,
    blob,
    check_count,
    clouds,
    ellipse,
    random_colour,
    rectangle,
    whole_folder,
    write_image,
)

CITIES = dict(train='drawnburg', val='drawnstadt')


class Street:
    """A street scene in one-point perspective: a picture and, from back to front, its polygons.

    Attributes:
        objects: label and polygon of each object, as in Cityscapes' JSON.
    """

    def __init__(self, width: int, height: int, rng: np.random.Generator):
        self.canvas, self.rng = Canvas(width, height, rng), rng
        self.width, self.height = width, height
        self.horizon = height * rng.uniform(0.36, 0.46)
        self.vanishing_x = width * rng.uniform(0.42, 0.58)
        # Where road and sidewalk reach the bottom of the picture, left and right.
        self.kerb = width * np.array([rng.uniform(-0.05, 0.15), rng.uniform(0.85, 1.05)])
        self.objects: list[tuple[str, list[list[int]]]] = []

    def draw(self) -> None:
        """Draw everything, the farthest first."""
        self._draw_sky()
        self._draw_ground()
        for side in (0, 1):
            self._draw_buildings(side)
        things = [(self.rng.uniform(0.12, 0.75), self._draw_tree) for _ in range(3)]
        things += [(self.rng.uniform(0.15, 0.8), self._draw_pole) for _ in range(3)]
        things += [(self.rng.uniform(0.12, 0.6), self._draw_car) for _ in range(3)]
        things += [(self.rng.uniform(0.25, 0.9), self._draw_person) for _ in range(2)]
        for nearness, draw in sorted(things, key=lambda thing: thing[0]):
            if self.rng.random() < 0.8:
                draw(nearness)
        self._draw_bonnet()

    def add(self, label: str, points: Points, colour: np.ndarray, **surface: float) -> None:
        """Paint an object and note its polygon, in whole pixels inside the picture."""
        points = np.clip(np.round(points), 0, (self.width - 1, self.height - 1))
        if cv2.contourArea(points.astype(np.int32)) < 2:
            return
        self.objects.append((label, points.astype(int).tolist()))
        self.canvas.fill(points, colour, **surface)

    def toward(self, x: float, nearness: float) -> tuple[float, float]:
        """Return a point of the ground on the line from x on the lower border to the horizon.

        Args:
            x: position on the lower border.
            nearness: 1 on the lower border, 0 at the horizon.
        """
        return (
            self.vanishing_x + (x - self.vanishing_x) * nearness,
            self.horizon + (self.height - self.horizon) * nearness,
        )

    def _draw_sky(self) -> None:
        whole = rectangle(0, 0, self.width, self.height)
        blue = np.array([230.0, 190, 140]) * self.rng.uniform(0.7, 1.05)
        self.add('sky', whole, blue, shading=0.2, grain=2)
        mix = clouds((self.height, self.width), self.rng)[..., None] ** 2
        self.canvas.image += (235 - self.canvas.image) * mix * self.rng.uniform(0.2, 0.9)

    def _draw_ground(self) -> None:
        corners = [(0, self.horizon), (self.width, self.horizon)]
        ground = np.array([*corners, (self.width, self.height), (0, self.height)])
        self.add('road', ground, np.full(3, self.rng.uniform(70, 115)), shading=0.2, grain=6)
        peak = (self.vanishing_x, self.horizon)
        for x in (self.kerb.mean() * s for s in (0.65, 1.35)):
            for near in (0.2, 0.4, 0.7):
                dash = [self.toward(x, near), self.toward(x + 4, near)]
                dash += [self.toward(x + 4, near * 1.35), self.toward(x, near * 1.35)]
                self.canvas.fill(np.array(dash), np.full(3, 215.0), grain=4)
        stone = np.array([135.0, 140, 150]) * self.rng.uniform(0.85, 1.15)
        for x, border in ((self.kerb[0], 0), (self.kerb[1], self.width)):
            walk = np.array([peak, (x, self.height), (border, self.height), (border, self.horizon)])
            self.add('sidewalk', walk, stone, shading=0.1, grain=10)
            line = np.array([peak, (x, self.height), (x + 0.015 * self.width, self.height)])
            self.canvas.fill(line, stone * 1.35)

    def _draw_buildings(self, side: int) -> None:
        # The fronts' line meets the lower border outside the picture.
        x = self.width * (-0.25 if side == 0 else 1.25)
        ends = [*np.sort(self.rng.uniform(0.08, 0.95, 4)), 1.3]
        for far, near in itertools.pairwise(ends):
            wall = random_colour(self.rng, 60, 170) * (0.85 if side else 1.0)
            storeys = self.rng.integers(2, 5)
            self.add('building', self._front(x, far, near, 0, storeys), wall, grain=10)
            glass = random_colour(self.rng, 25, 75)
            for storey, column in itertools.product(range(storeys), (0.1, 0.4, 0.7)):
                left = far + (near - far) * column
                pane = self._front(x, left, left + (near - far) * 0.18, storey + 0.35, storey + 0.8)
                self.canvas.fill(pane, glass, grain=3)

    def _front(self, x: float, far: float, near: float, low: float, high: float) -> Points:
        """Part of a house front between two distances and two heights, in storeys."""
        corners = [(far, low), (near, low), (near, high), (far, high)]
        storey = np.array([0, -0.22 * self.height])
        return np.array([self.toward(x, n) + storey * n * up for n, up in corners])

    def _on_sidewalk(self, nearness: float) -> tuple[float, float]:
        side = self.rng.integers(2)
        return self.toward(self.kerb[side] + self.width * (0.1 if side else -0.1), nearness)

    def _draw_tree(self, nearness: float) -> None:
        x, y = self._on_sidewalk(nearness)
        size = self.height * 0.55 * nearness
        trunk = rectangle(x - size * 0.05, y - size * 1.1, x + size * 0.05, y)
        self.add('vegetation', trunk, np.array([40.0, 60, 80]))
        green = np.array([40.0, 105, 60]) * self.rng.uniform(0.6, 1.2)
        crown = blob(x, y - size * 1.4, size * 0.55, size * 0.6, self.rng)
        self.add('vegetation', crown, green, shading=0.6, grain=22)

    def _draw_pole(self, nearness: float) -> None:
        x, y = self._on_sidewalk(nearness)
        size = self.height * nearness
        half = max(0.018 * size, 1.0)
        grey = np.full(3, self.rng.uniform(90, 150))
        self.add('pole', rectangle(x - half, y - size, x + half, y), grey, shading=0.5)
        if self.rng.random() < 0.5:
            sign = ellipse(x, y - size, max(0.09 * size, 3), max(0.09 * size, 3), 10)
            self.add('traffic sign', sign, np.array([30.0, 30, 210]), grain=3)
            inner = ellipse(x, y - size, 0.05 * size, 0.05 * size, 10)
            self.canvas.fill(inner, np.full(3, 235.0), grain=3)
        else:
            box = rectangle(x - 0.05 * size, y - 1.15 * size, x + 0.05 * size, y - 0.9 * size)
            self.add('traffic light', box, np.full(3, 35.0), grain=3)
            lamp = ellipse(x, y - 1.08 * size, 0.03 * size, 0.04 * size, 8)
            self.canvas.fill(lamp, np.array([40.0, 220, 60]), grain=0)

    def _draw_car(self, nearness: float) -> None:
        x, y = self.toward(self.kerb.mean() + self.width * self.rng.uniform(-0.3, 0.3), nearness)
        half, size = self.width * 0.14 * nearness, self.height * 0.5 * nearness
        across, up = [-1, -1, -0.72, -0.58, 0.58, 0.72, 1, 1], [0, 0.55, 0.62, 1, 1, 0.62, 0.55, 0]

        def place(points: list[tuple[float, float]]) -> Points:
            return np.array(points) * (half, -size) + (x, y)

        paint = random_colour(self.rng, 30, 230)
        self.add('car', place(list(zip(across, up, strict=True))), paint, shading=0.5, grain=4)
        for wheel in (-0.78, 0.78):
            tyre = [(wheel - 0.2, 0), (wheel + 0.2, 0), (wheel + 0.2, 0.16), (wheel - 0.2, 0.16)]
            self.canvas.fill(place(tyre), np.full(3, 25.0), grain=3)
            lamp = [(wheel - 0.15, 0.38), (wheel + 0.15, 0.38), (wheel + 0.15, 0.5)]
            self.canvas.fill(place(lamp), np.array([30.0, 30, 220]), grain=3)
        window = [(-0.58, 0.64), (0.58, 0.64), (0.48, 0.93), (-0.48, 0.93)]
        self.canvas.fill(place(window), random_colour(self.rng, 30, 80), grain=3)

    def _draw_person(self, nearness: float) -> None:
        x, y = self._on_sidewalk(nearness)
        size = self.height * 0.55 * nearness
        right = [(0.1, 0), (0.13, 0.5), (0.19, 0.55), (0.17, 0.82), (0.07, 0.85), (0.09, 0.95)]
        outline = [*right, (0, 1), *((-across, up) for across, up in reversed(right))]

        def place(points: list[tuple[float, float]]) -> Points:
            return np.array(points) * (size, -size) + (x, y)

        self.add('person', place(outline), random_colour(self.rng, 20, 110))
        shirt = [
            (0.13, 0.5),
            (0.19, 0.55),
            (0.17, 0.82),
            (-0.17, 0.82),
            (-0.19, 0.55),
            (-0.13, 0.5),
        ]
        self.canvas.fill(place(shirt), random_colour(self.rng, 40, 230))
        head = ellipse(0, 0.92, 0.075, 0.08, 12)
        skin = np.array([120.0, 160, 210]) * self.rng.uniform(0.45, 1.1)
        self.canvas.fill(place(list(head)), skin)

    def _draw_bonnet(self) -> None:
        middle, low = self.width / 2, self.height * 0.93
        across = np.linspace(-1, 1, 9)
        arc = [(middle + 0.46 * self.width * a, low + 0.06 * self.height * a**4) for a in across]
        bonnet = np.array([*arc, (self.width, self.height), (0, self.height)])
        self.add('ego vehicle', bonnet, np.full(3, 45.0), shading=0.4, grain=3)


def draw_cityscapes(
    out: str | os.PathLike,
    num_train: int = 120,
    num_val: int = 24,
    size: tuple[int, int] = (256, 128),
    seed: int = 0,
) -> None:
    """Draw the data set ``out``; the same arguments give the same files.

    Args:
        out: Cityscapes' root folder; it must not exist, and appears once it is complete.
        num_train: images of the train split.
        num_val: images of the val split.
        size: width and height of the images.
        seed: the seed of all random choices.

    Raises:
        FileExistsError: if ``out`` exists.
        ValueError: if images are too few or too small.
    """
    check_count('num_train', num_train, 1)
    check_count('num_val', num_val, 1)
    check_count('size', min(size), 64)
    width, height = size
    with whole_folder(out) as folder:
        for number, (split, count) in enumerate((('train', num_train), ('val', num_val))):
            images = folder / 'leftImg8bit' / split / CITIES[split]
            labels = folder / 'gtFine' / split / CITIES[split]
            images.mkdir(parents=True)
            labels.mkdir(parents=True)
            for index in range(count):
                street = Street(width, height, np.random.default_rng((seed, number, index)))
                street.draw()
                name = f'{CITIES[split]}_{index:06d}_000019'
                write_image(images / f'{name}_leftImg8bit.png', street.canvas.photograph())
                write_labels(labels, name, street)


def write_labels(folder: Path, name: str, street: Street) -> None:
    """Write the polygons and, from them, the label images."""
    polygons = folder / f'{name}_gtFine_polygons.json'
    objects = [dict(label=label, polygon=polygon) for label, polygon in street.objects]
    content = dict(imgHeight=street.height, imgWidth=street.width, objects=objects)
    polygons.write_text(json.dumps(content))
    for suffix, encoding in (('labelIds', 'ids'), ('labelTrainIds', 'trainIds')):
        json2labelImg(str(polygons), str(folder / f'{name}_gtFine_{suffix}.png'), encoding)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', help='folder to make; leftImg8bit and gtFine will be in it')
    parser.add_argument('--num-train', type=int, default=120, help='images of the train split')
    parser.add_argument('--num-val', type=int, default=24, help='images of the val split')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        default=(256, 128),
        metavar=('W', 'H'),
        help='width and height of the images (default: 256 128)',
    )
    parser.add_argument('--seed', type=int, default=0, help='random seed (default: 0)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    draw_cityscapes(args.out, args.num_train, args.num_val, tuple(args.size), args.seed)


if __name__ == '__main__':
    main()
