"""Inputs for comparing exports."""

import cv2
import numpy as np
import pytest


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp('picture') / 'picture.png'
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    cv2.imwrite(str(path), cv2.GaussianBlur(pixels, (0, 0), 3))
    return path
