import math

import pytest
import torch

pytest.importorskip('mmdet')
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData

from mmexpand.models import YOLOV2Head

# Sizes that float32 holds exactly, so that float64 comparisons are not limited by the anchors.
ANCHORS = [(16.0, 24.0), (48.0, 40.0), (96.0, 120.0)]
SCALES = dict(object_scale=5.0, noobject_scale=0.7, coord_scale=1.5, class_scale=1.25)
TEST_CFG = ConfigDict(
    score_thr=0.005, nms_pre=1000, nms=dict(type='nms', iou_threshold=0.45), max_per_img=100
)


@pytest.fixture(autouse=True)
def mmdet_scope():
    register_all_modules()
    MessageHub.get_current_instance().update_info('iter', 1000)


def build_head(num_classes=4, **kwargs):
    return YOLOV2Head(
        num_classes=num_classes,
        in_channels=8,
        feat_channels=8,
        anchor_generator=dict(type='YOLOAnchorGenerator', base_sizes=[ANCHORS], strides=[32]),
        test_cfg=TEST_CFG,
        **kwargs,
    )


def instances(boxes, labels):
    return InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.long),
    )


def random_map(*size, num_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (size[0], len(ANCHORS) * (5 + num_classes), *size[1:])
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def box_at(pred, n, j, i):
    """Decoded box, in cells: centre and size."""
    tx, ty, tw, th = pred[n, :4, j, i].tolist()
    anchor_w, anchor_h = ANCHORS[n]
    return (
        sigmoid(tx) + i,
        sigmoid(ty) + j,
        anchor_w / 32 * math.exp(tw),
        anchor_h / 32 * math.exp(th),
    )


def iou(a, b):
    def overlap(x1, w1, x2, w2):
        return min(x1 + w1 / 2, x2 + w2 / 2) - max(x1 - w1 / 2, x2 - w2 / 2)

    w, h = overlap(a[0], a[2], b[0], b[2]), overlap(a[1], a[3], b[1], b[3])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / (a[2] * a[3] + b[2] * b[3] - w * h)


def region_gradient(pred_map, gts, num_classes, warmup=False):
    """Darknet's region layer cell by cell: minus its delta, after the logistic's gradient."""
    num_images, _, height, width = pred_map.shape
    pred = pred_map.reshape(num_images, len(ANCHORS), 5 + num_classes, height, width)
    gradient = torch.zeros_like(pred)

    def slope(s):
        return s * (1 - s)

    def pull_box(image, n, j, i, target, scale):
        for channel in range(2):
            s = sigmoid(pred[image, n, channel, j, i].item())
            gradient[image, n, channel, j, i] = scale * (s - target[channel]) * slope(s)
        for channel in range(2, 4):
            gradient[image, n, channel, j, i] = scale * (
                pred[image, n, channel, j, i] - target[channel]
            )

    for image, gt in enumerate(gts):
        truths = [
            ((x1 + x2) / 64, (y1 + y2) / 64, (x2 - x1) / 32, (y2 - y1) / 32)
            for x1, y1, x2, y2 in gt.bboxes.tolist()
        ]
        for n in range(len(ANCHORS)):
            for j in range(height):
                for i in range(width):
                    best = max((iou(box_at(pred[image], n, j, i), t) for t in truths), default=0)
                    if best <= 0.5:
                        s = sigmoid(pred[image, n, 4, j, i].item())
                        gradient[image, n, 4, j, i] = SCALES['noobject_scale'] * s * slope(s)
                    if warmup:
                        pull_box(image, n, j, i, (0.5, 0.5, 0.0, 0.0), 0.01)
        for truth, label in zip(truths, gt.labels.tolist(), strict=True):
            i, j = int(truth[0]), int(truth[1])
            shapes = [iou((0, 0, w / 32, h / 32), (0, 0, truth[2], truth[3])) for w, h in ANCHORS]
            n = shapes.index(max(shapes))
            target = (
                truth[0] - i,
                truth[1] - j,
                math.log(truth[2] * 32 / ANCHORS[n][0]),
                math.log(truth[3] * 32 / ANCHORS[n][1]),
            )
            pull_box(image, n, j, i, target, SCALES['coord_scale'])
            s = sigmoid(pred[image, n, 4, j, i].item())
            gradient[image, n, 4, j, i] = SCALES['object_scale'] * (s - 1) * slope(s)
            one_hot = torch.nn.functional.one_hot(torch.tensor(label), num_classes)
            gradient[image, n, 5:, j, i] = SCALES['class_scale'] * (
                pred[image, n, 5:, j, i].softmax(0) - one_hot
            )
    return gradient.reshape(pred_map.shape) / num_images


def gradient_of_loss(head, pred_map, gts):
    pred_map = pred_map.clone().requires_grad_()
    losses = head.loss_by_feat(pred_map, gts, [{}] * len(gts))
    sum(losses.values()).backward()
    return pred_map.grad


def two_images():
    return [
        # The second and third box meet in one prediction; the fourth is near the border.
        instances(
            [[10, 20, 90, 80], [40, 66, 57, 91], [41, 67, 56, 92], [100, 100, 127.5, 159]],
            [0, 1, 2, 3],
        ),
        instances([[3, 5, 120, 150]], [2]),
    ]


def test_decode_equals_a_loop():
    head = build_head().double()
    pred_map = random_map(2, 5, 4)
    boxes, scores = head.decode(pred_map)
    assert boxes.shape == (2, 5 * 4 * 3, 4)
    assert scores.shape == (2, 5 * 4 * 3, 4)
    pred = pred_map.reshape(2, 3, 9, 5, 4)
    for image in range(2):
        for j in range(5):
            for i in range(4):
                for n in range(3):
                    x, y, w, h = (32 * v for v in box_at(pred[image], n, j, i))
                    at = (j * 4 + i) * 3 + n
                    corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
                    expected = torch.tensor(corners, dtype=torch.float64)
                    torch.testing.assert_close(boxes[image, at], expected, rtol=1e-12, atol=1e-10)
                    objectness = sigmoid(pred[image, n, 4, j, i].item())
                    torch.testing.assert_close(
                        scores[image, at],
                        objectness * pred[image, n, 5:, j, i].softmax(0),
                        rtol=1e-12,
                        atol=1e-14,
                    )


def test_loss_by_hand():
    """One cell, one class; the responsible anchor is the second, and all raw values are zero.

    Box 48 x 60 centred at (8, 16) of the 32-pixel cell: x = 1/4, y = 1/2, tw = 0, th = log 1.5.
    Every sigmoid is 1/2.
    """
    head = build_head(num_classes=1).double()
    pred_map = torch.zeros(1, 3 * 6, 4, 4, dtype=torch.float64)
    # Centre (72, 80): cell (2, 2).
    losses = head.loss_by_feat(pred_map, [instances([[48, 50, 96, 110]], [0])], [{}])
    assert losses['loss_xy'].item() == pytest.approx(0.5 * 0.25**2, abs=1e-14)
    assert losses['loss_wh'].item() == pytest.approx(0.5 * math.log(1.5) ** 2, abs=1e-12)
    assert losses['loss_obj'].item() == pytest.approx(0.5 * 5 * 0.25, abs=1e-14)
    assert losses['loss_cls'].item() == 0
    # 48 predictions, of which the responsible one is not background; no other overlaps enough.
    assert losses['loss_noobj'].item() == pytest.approx(0.5 * 47 * 0.25, abs=1e-12)


@pytest.mark.parametrize('warmup', [False, True])
def test_gradient_is_darknets(warmup):
    head = build_head(anchor_warmup_iters=10, **SCALES).double()
    MessageHub.get_current_instance().update_info('iter', 9 if warmup else 10)
    pred_map = random_map(2, 5, 4)
    gts = two_images()
    expected = region_gradient(pred_map, gts, 4, warmup)
    actual = gradient_of_loss(head, pred_map, gts)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_predictions_that_overlap_an_object_are_not_punished():
    """Some predictions of the comparison above must be spared, or it would prove nothing."""
    head = build_head(**SCALES).double()
    pred_map = 0.1 * random_map(1, 5, 4)
    gts = [instances([[28, 24, 124, 136]], [1])]
    gradient = gradient_of_loss(head, pred_map, gts)
    objectness = gradient.reshape(1, 3, 9, 5, 4)[:, :, 4]
    assert (objectness < 0).sum() == 1
    assert (objectness == 0).sum() >= 1
    torch.testing.assert_close(gradient, region_gradient(pred_map, gts, 4), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ('box', 'cell', 'anchor'),
    [
        ([0, 0, 16, 24], (0, 0), 0),
        ([40, 44, 88, 84], (2, 2), 1),
        ([0, 0, 128, 160], (2, 2), 2),
        ([127, 159, 128, 160], (4, 3), 0),
    ],
)
def test_responsible_prediction(box, cell, anchor):
    head = build_head().double()
    gt_boxes = torch.tensor([box], dtype=torch.float64)
    index = head._responsible_index(gt_boxes, torch.Size([5, 4]))
    assert index.tolist() == [(cell[0] * 4 + cell[1]) * 3 + anchor]


def test_image_without_boxes_has_only_background():
    head = build_head().double()
    pred_map = random_map(1, 3, 3).requires_grad_()
    losses = head.loss_by_feat(pred_map, [instances([], [])], [{}])
    objectness = pred_map.reshape(1, 3, 9, 3, 3)[:, :, 4].sigmoid()
    torch.testing.assert_close(losses.pop('loss_noobj'), objectness.square().sum() / 2)
    assert all(loss.item() == 0 for loss in losses.values())
    assert all(loss.requires_grad for loss in losses.values())


def test_degenerate_boxes_change_nothing():
    head = build_head().double()
    pred_map = random_map(1, 5, 4)
    good = [10.0, 20.0, 90.0, 80.0]
    degenerate = [[5, 5, 5, 50], [5, 5, 50, 5], [30, 30, 20, 20], [200, 200, 300, 300]]
    losses = head.loss_by_feat(pred_map, [instances([good], [1])], [{}])
    same = head.loss_by_feat(pred_map, [instances([*degenerate, good], [0, 0, 0, 0, 1])], [{}])
    for name, loss in losses.items():
        assert torch.equal(loss, same[name])
        assert torch.isfinite(loss)


def test_ignored_boxes_are_no_objects():
    head = build_head().double()
    feature = torch.rand(1, 8, 5, 4, dtype=torch.float64)

    def loss(ignored):
        sample = DetDataSample(metainfo=dict(img_shape=(160, 128)))
        sample.gt_instances = instances([[10, 20, 90, 80]], [1])
        sample.ignored_instances = instances(ignored, [0] * len(ignored))
        return head.loss((feature,), [sample])

    for a, b in zip(loss([]).values(), loss([[0, 0, 60, 60]]).values(), strict=True):
        assert torch.equal(a, b)


def test_half_precision_loss_is_computed_in_float32():
    head = build_head()
    pred_map = random_map(1, 5, 4).half()
    losses = head.loss_by_feat(pred_map, two_images()[:1], [{}])
    exact = head.loss_by_feat(pred_map.float(), two_images()[:1], [{}])
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert torch.equal(loss, exact[name])


def predict(boxes, rescale=False):
    """Predictions that are certain of (anchor, class, objectness) at some cells, and of no more."""
    # float32, because mmcv's NMS takes nothing else.
    pred_map = torch.zeros(1, 3, 9, 5, 4)
    pred_map[:, :, 4] = -50
    for (n, j, i), label, objectness in boxes:
        pred_map[0, n, 4, j, i] = objectness
        pred_map[0, n, 5 + label, j, i] = 50
    meta = dict(img_shape=(160, 128), ori_shape=(320, 512), scale_factor=(0.25, 0.5))
    (result,) = build_head().predict_by_feat(pred_map.flatten(1, 2), [meta], rescale=rescale)
    return result


def test_nms_is_class_wise():
    # In two neighbouring cells the large anchor's boxes have an IoU of 1/2.
    same_class = predict([((2, 2, 1), 1, 1.0), ((2, 2, 2), 1, 2.0)])
    assert same_class.labels.tolist() == [1]
    assert same_class.scores.item() == pytest.approx(sigmoid(2.0), abs=1e-6)
    assert same_class.bboxes.tolist() == [[32, 20, 128, 140]]
    two_classes = predict([((2, 2, 1), 0, 1.0), ((2, 2, 2), 1, 2.0)])
    assert two_classes.labels.tolist() == [1, 0]


def test_boxes_are_rescaled_and_clipped():
    result = predict([((2, 0, 0), 3, 4.0)])
    # Centre (16, 16), anchor 96 x 120: from (-32, -44) to (64, 76).
    assert result.bboxes.tolist() == [[0, 0, 64, 76]]
    rescaled = predict([((2, 0, 0), 3, 4.0)], rescale=True)
    assert rescaled.bboxes.tolist() == [[0, 0, 256, 152]]
    assert rescaled.labels.tolist() == [3]
    # Centre (112, 144) of 128 x 160: beyond the far borders.
    assert predict([((2, 4, 3), 3, 4.0)]).bboxes.tolist() == [[64, 84, 128, 160]]


def test_nothing_above_the_threshold():
    result = predict([])
    assert result.bboxes.shape == (0, 4)
    assert len(result.scores) == 0


def test_several_levels_are_refused():
    with pytest.raises(ValueError, match='one level'):
        YOLOV2Head(
            num_classes=1,
            in_channels=8,
            anchor_generator=dict(
                type='YOLOAnchorGenerator', base_sizes=[ANCHORS, ANCHORS], strides=[32, 16]
            ),
        )


def test_overfits_two_images():
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='mmdet.SingleStageDetector',
            backbone=dict(type='YOLOLite', channels=(8, 8, 16, 16, 16)),
            bbox_head=dict(type='YOLOV2Head', num_classes=2, in_channels=16, feat_channels=32),
            test_cfg=TEST_CFG,
        )
    )
    model.init_weights()
    images = torch.full((2, 3, 128, 128), 0.4)
    images[0, 0, 20:70, 30:90] = 1.0
    images[1, 2, 60:120, 50:95] = 1.0
    truths = [([30, 20, 90, 70], 0), ([50, 60, 95, 120], 1)]
    samples = []
    for box, label in truths:
        sample = DetDataSample(
            metainfo=dict(img_shape=(128, 128), ori_shape=(128, 128), scale_factor=(1.0, 1.0))
        )
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([box], dtype=torch.float32), labels=torch.tensor([label])
        )
        samples.append(sample)

    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    history = []
    for _ in range(120):
        loss = sum(model.loss(images, samples).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.1 * history[0]

    model.eval()
    with torch.no_grad():
        predictions = model.predict(images, samples)
    for prediction, (box, label) in zip(predictions, truths, strict=True):
        best = prediction.pred_instances[:1]
        assert best.labels.item() == label
        assert best.scores.item() > 0.5
        found = best.bboxes[0]
        assert (found - torch.tensor(box)).abs().max() < 8
