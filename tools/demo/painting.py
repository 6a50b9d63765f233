"""Photograph-like drawing with polygons: what draw_voc.py and draw_cityscapes.py share."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

Points = np.ndarray
"""Corners of a polygon, shape (n, 2), x and y in pixels."""
SUBPIXEL_BITS = 4


class Canvas:
    """An image that is painted polygon by polygon, later ones over earlier ones.

    Attributes:
        image: float32, shape (height, width, 3), BGR, about 0 to 255.
    """

    def __init__(self, width: int, height: int, rng: np.random.Generator):
        self.image = np.zeros((height, width, 3), np.float32)
        self.rng = rng

    def fill(
        self,
        points: Points,
        colour: np.ndarray,
        shading: float = 0.35,
        grain: float = 8.0,
        smooth: bool = True,
    ) -> np.ndarray:
        """Paint a polygon with a lit, grainy surface.

        Args:
            points: its corners; they may lie outside the image.
            colour: BGR.
            shading: how much darker the side away from the light is, 0 to 1.
            grain: standard deviation of its texture.
            smooth: blend the border's pixels with what is behind.

        Returns:
            Where it was painted, bool, shape (height, width).
        """
        height, width = self.image.shape[:2]
        x0, y0 = np.clip(np.floor(points.min(0)), 0, (width, height)).astype(int)
        x1, y1 = np.clip(np.ceil(points.max(0)) + 1, 0, (width, height)).astype(int)
        painted = np.zeros((height, width), bool)
        if x0 >= x1 or y0 >= y1:
            return painted
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        fixed = np.round((points - (x0, y0)) * (1 << SUBPIXEL_BITS)).astype(np.int32)
        line = cv2.LINE_AA if smooth else cv2.LINE_8
        cv2.fillPoly(mask, [fixed], 255, line, SUBPIXEL_BITS)
        light = np.add.outer(np.linspace(0.5, -0.5, y1 - y0), np.linspace(0.5, -0.5, x1 - x0))
        texture = self.rng.normal(0, grain, mask.shape)
        surface = colour * (1 + shading * light[..., None]) + texture[..., None]
        alpha = mask[..., None] / np.float32(255)
        region = self.image[y0:y1, x0:x1]
        region += alpha * (surface - region)
        painted[y0:y1, x0:x1] = mask > 127
        return painted

    def photograph(self, blur: float = 0.6, noise: float = 4.0) -> np.ndarray:
        """Return the canvas with exposure, vignette, blur and sensor noise of a camera.

        Returns:
            uint8, shape (height, width, 3), BGR.
        """
        height, width = self.image.shape[:2]
        ys, xs = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        exposure = self.rng.uniform(0.8, 1.15) * self.rng.uniform(0.94, 1.06, 3)
        image = self.image * exposure * (1 - 0.15 * (xs**2 + ys**2))[..., None]
        image = cv2.GaussianBlur(image, (0, 0), blur)
        image += self.rng.normal(0, noise, image.shape)
        return np.clip(image, 0, 255).astype(np.uint8)


def clouds(shape: tuple[int, int], rng: np.random.Generator, octaves: int = 5) -> np.ndarray:
    """Smooth noise, rough at every scale, values 0 to 1, float32.

    Args:
        shape: height and width.
        rng: source of randomness.
        octaves: number of scales; each has twice the detail of the one before, at half the height.
    """
    height, width = shape
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        cells = 2 ** (octave + 1) + 1
        coarse = rng.random((cells, cells), dtype=np.float32)
        total += 0.5**octave * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    total -= total.min()
    return total / max(total.max(), 1e-6)


def ellipse(cx: float, cy: float, rx: float, ry: float, corners: int = 24) -> Points:
    """Return an ellipse as a polygon."""
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], 1)


def rectangle(x0: float, y0: float, x1: float, y1: float) -> Points:
    """Return a rectangle as a polygon."""
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], float)


def blob(
    cx: float, cy: float, rx: float, ry: float, rng: np.random.Generator, corners: int = 28
) -> Points:
    """Return an uneven ellipse, like the outline of leaves."""
    radius = rng.uniform(0.75, 1.1, (corners, 1))
    return (ellipse(0, 0, rx, ry, corners) * radius) + (cx, cy)


def random_colour(rng: np.random.Generator, low: float = 30, high: float = 220) -> np.ndarray:
    """Return a random colour, BGR."""
    return rng.uniform(low, high, 3)


@contextmanager
def whole_folder(out: str | os.PathLike) -> Iterator[Path]:
    """Make a folder that appears under its name once all files in it are written.

    Args:
        out: the folder; it must not exist.

    Raises:
        FileExistsError: if it exists.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f'{out} exists already; remove it or name another folder')
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an image file.

    Raises:
        OSError: if that fails; OpenCV alone would not raise an error.
    """
    if not cv2.imwrite(str(path), image):
        raise OSError(f'cannot write {path}')


def check_count(name: str, value: int, least: int) -> None:
    """Refuse a number that is too small, by name."""
    if value < least:
        raise ValueError(f'{name} must be at least {least}, got {value}')
