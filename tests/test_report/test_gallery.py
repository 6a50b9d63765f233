"""How wrong a picture is, by hand."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from mmexpand.report.gallery import WIDTH, Boxes, boxes_picture, class_colors, mask_picture

IMAGE = np.full((50, 100, 3), 200, np.uint8)
CLASSES = ['cat', 'dog']
COLORS = [(255, 0, 0), (0, 0, 255)]


def boxes(*rows, scores=None):
    corners = np.array([row[:4] for row in rows], float).reshape(-1, 4)
    return Boxes(corners, np.array([row[4] for row in rows], int), scores and np.array(scores))


def picture(truth, said, scores, ignored=None):
    found = boxes(*said, scores=scores) if said else Boxes(*empty(), np.zeros(0))
    there = boxes(*truth) if truth else Boxes(*empty())
    return boxes_picture('a.jpg', IMAGE, there, found, CLASSES, ignored)


def empty():
    return np.zeros((0, 4)), np.zeros(0, int)


CAT, DOG = (0, 0, 10, 10, 0), (50, 0, 70, 20, 1)


@pytest.mark.parametrize(
    ('truth', 'said', 'scores', 'error', 'errors'),
    [
        ([CAT, DOG], [CAT, DOG], [0.9, 0.8], 0, {0: 0, 1: 0}),
        ([CAT, DOG], [CAT], [0.9], 1 / 2, {0: 0, 1: 1}),
        ([CAT], [CAT, DOG], [0.9, 0.8], 1 / 2, {0: 0, 1: 1}),
        ([CAT], [CAT, DOG], [0.9, 0.29], 0, {0: 0}),  # Too low a score to be said.
        ([CAT], [CAT, CAT], [0.5, 0.6], 1 / 2, {0: 1 / 2}),  # A box is found once.
        ([CAT], [(0, 0, 10, 10, 1)], [0.9], 1, {0: 1, 1: 1}),  # Of another class.
        ([CAT], [(0, 0, 10, 5, 0)], [0.9], 0, {0: 0}),  # An IoU of 0.5.
        ([CAT], [(0, 0, 10, 4.9, 0)], [0.9], 1, {0: 1}),
        ([], [], [], 0, {}),
        ([CAT], [], [], 1, {0: 1}),
        ([], [CAT], [0.9], 1, {0: 1}),
    ],
)
def test_error_of_boxes(truth, said, scores, error, errors):
    found = picture(truth, said, scores)
    assert found.error == error
    assert found.errors == errors


def test_the_better_of_two_finds_the_box():
    found = picture([CAT], [(0, 0, 10, 9, 0), CAT], [0.6, 0.9])
    said = [(box.text, box.right) for box in found.prediction.boxes]
    assert said == [('cat 0.90', True), ('cat 0.60', False)]
    assert [(box.text, box.right) for box in found.truth.boxes] == [('cat', True)]


def test_ignored_boxes_may_be_found_or_not():
    assert picture([CAT], [CAT], [0.9], boxes(DOG)).error == 0
    assert picture([CAT], [CAT, DOG], [0.9, 0.8], boxes(DOG)).errors == {0: 0}
    # As in VOC's evaluation, however often.
    assert picture([CAT], [CAT, DOG, DOG], [0.9, 0.8, 0.7], boxes(DOG)).error == 0
    assert picture([CAT], [CAT, DOG], [0.9, 0.8]).error == 1 / 2


def test_error_of_masks():
    truth = np.array([[0, 0, 1, 1], [0, 0, 1, 255]], np.uint8)
    said = np.array([[0, 0, 0, 1], [0, 1, 1, 0]], np.uint8)
    found = mask_picture('a.png', np.zeros((2, 4, 3), np.uint8), truth, said, COLORS)
    # Of class 0 three right, one false and one missed; of class 1 two, one and one.
    assert found.errors == pytest.approx({0: 2 / 5, 1: 2 / 4})
    assert found.error == pytest.approx(4 / 9)


def test_masks_are_drawn_in_the_classes_colors_and_small():
    truth = np.zeros((80, 1000), np.uint8)
    truth[:, 500:] = 1
    truth[:, 900:] = 255
    image = np.zeros((80, 1000, 3), np.uint8)
    found = mask_picture('a.png', image, truth, truth, COLORS)
    assert found.error == 0
    assert (found.width, found.height) == (1000, 80)
    mask = decode(found.truth.mask).convert('RGBA')
    assert mask.size == (WIDTH, 29)
    assert [mask.getpixel((x, 5)) for x in (9, 200)] == [(255, 0, 0, 255), (0, 0, 255, 255)]
    assert mask.getpixel((355, 5))[3] == 0
    assert decode(found.image).size == (WIDTH, 29)


def decode(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(',')[1])))


def test_colors_are_the_data_sets_or_all_different():
    assert class_colors([[1, 2, 3], [4, 5, 6]], 2) == [(1, 2, 3), (4, 5, 6)]
    assert len(set(class_colors(None, 80))) == 80
    assert len(set(class_colors('random', 3))) == 3
