"""KD, hint and PKT against their formulas, written out in float64 with numpy."""

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from torch.nn import functional as F

from mmexpand.models import HintLoss, KDLoss, PKTLoss


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def softmax(x):
    e = np.exp(x)
    return e / e.sum()


def kd(student, teacher, tau):
    """Logits are vectors."""
    p, q = softmax(teacher / tau), softmax(student / tau)
    return tau**2 * sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize('tau', [1.0, 4.0])
def test_kd_of_logits(tau):
    student, teacher = draw(5, 7), draw(5, 7, seed=1)
    expected = np.mean(
        [kd(s.numpy(), t.numpy(), tau) for s, t in zip(student, teacher, strict=True)]
    )
    found = MODELS.build(dict(type='KDLoss', tau=tau, loss_weight=0.5))(student, teacher)
    assert expected > 0.1
    assert found.item() == pytest.approx(0.5 * expected, rel=1e-12)


def test_kd_is_nothing_between_equals_and_its_gradient_is_hintons():
    student, teacher = draw(5, 7).requires_grad_(), draw(5, 7, seed=1)
    assert KDLoss(2.0)(teacher, teacher).item() == pytest.approx(0, abs=1e-15)
    # Sec. 2.1: at a high temperature (z - v) / N for logits of zero mean, times T ** 2 / T ** 2.
    KDLoss(tau=1e4)(student, teacher).backward()
    centred = [x - x.mean(1, keepdim=True) for x in (student.detach(), teacher)]
    torch.testing.assert_close(5 * student.grad, (centred[0] - centred[1]) / 7, rtol=0, atol=1e-4)


def test_kd_of_class_maps_is_the_mean_over_pixels():
    student, teacher = draw(2, 4, 3, 5), draw(2, 4, 3, 5, seed=1)
    pixels = [x.permute(0, 2, 3, 1).reshape(-1, 4).numpy() for x in (student, teacher)]
    expected = np.mean([kd(s, t, 2.0) for s, t in zip(*pixels, strict=True)])
    assert KDLoss(2.0)(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_kd_of_a_detector_compares_the_classes_of_each_anchor():
    student, teacher = draw(2, 3 * (5 + 4), 2, 2), draw(2, 3 * (5 + 4), 2, 2, seed=1)
    values = []
    for image in range(2):
        for anchor in range(3):
            part = slice(9 * anchor + 5, 9 * anchor + 9)
            for y in range(2):
                for x in range(2):
                    s, t = (m[image, part, y, x].numpy() for m in (student, teacher))
                    values.append(kd(s, t, 4.0))
    found = KDLoss(num_anchors=3, num_classes=4)(student, teacher)
    assert found.item() == pytest.approx(np.mean(values), rel=1e-12)


def test_hint_without_and_with_a_regressor():
    student, teacher = draw(2, 3, 4, 4), draw(2, 5, 4, 4, seed=1)
    expected = 0.5 * ((student.numpy() - teacher[:, :3].numpy()) ** 2).mean()
    found = HintLoss(loss_weight=3.0)(student, teacher[:, :3])
    assert found.item() == pytest.approx(3 * expected, rel=1e-12)
    loss = HintLoss(in_channels=3, out_channels=5).double()
    regressor = loss.regressor
    seen = F.conv2d(student, regressor.weight[:, :, None, None], regressor.bias)
    expected = 0.5 * ((seen.detach().numpy() - teacher.numpy()) ** 2).mean()
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    loss(student, teacher).backward()
    assert regressor.weight.grad.abs().min() > 0
    assert regressor.bias.grad.abs().min() > 0


def test_hint_of_vectors():
    student, teacher = draw(6, 3), draw(6, 2, seed=1)
    loss = HintLoss(in_channels=3, out_channels=2).double()
    weight, bias = (p.detach().numpy() for p in loss.regressor.parameters())
    expected = 0.5 * ((student.numpy() @ weight.T + bias - teacher.numpy()) ** 2).mean()
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def neighbours(features):
    flat = features.flatten(1).numpy()
    n = len(flat)
    p = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            cosine = flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j])
            p[i, j] = (cosine + 1) / 2
        p[i] /= p[i].sum()
    return p


def test_pkt_of_features_of_any_sizes():
    student, teacher = draw(6, 3, 4, 4), draw(6, 10, seed=1)
    p, q = neighbours(teacher), neighbours(student)
    expected = (p * np.log(p / q)).sum(1).mean()
    assert expected > 0.01
    # 1e-7 is added to probabilities of about 1 / 6.
    assert PKTLoss(2.0)(student, teacher).item() == pytest.approx(2 * expected, rel=1e-5)
    assert PKTLoss()(teacher * 7, teacher).item() == pytest.approx(0, abs=1e-12)


def test_pkt_of_the_last_image_of_an_epoch_is_zero():
    loss, student = PKTLoss(), draw(1, 4).requires_grad_()
    loss(draw(2, 4), draw(2, 4, seed=1))
    value = loss(student, draw(1, 4, seed=1))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-12


def test_a_teachers_map_is_brought_to_the_students_size():
    student, teacher = draw(2, 4, 6, 6), draw(2, 4, 3, 3, seed=1)
    larger = F.interpolate(teacher, (6, 6), mode='bilinear', align_corners=False)
    for loss in (KDLoss(), HintLoss()):
        torch.testing.assert_close(loss(student, teacher), loss(student, larger))


@pytest.mark.parametrize(
    ('loss', 'student', 'teacher', 'message'),
    [
        (KDLoss(), (2, 10), (2, 100), r'student gives 10 scores and the teacher 100; use'),
        (KDLoss(num_anchors=3), (2, 10, 1, 1), (2, 10, 1, 1), '10 channels cannot be divided'),
        (
            HintLoss(),
            (2, 3, 4, 4),
            (2, 5, 4, 4),
            r'3 channels and the teacher 5; set in_channels=3',
        ),
        (HintLoss(3, 4), (2, 3), (2, 5), r'the teacher 5; set in_channels=3, out_channels=5'),
        (HintLoss(), (2, 3), (2, 3, 4, 4), 'name modules that both give vectors, or both maps'),
        (PKTLoss(), (1, 3), (1, 3), 'this batch has one'),
    ],
)
def test_what_cannot_be_compared_is_refused(loss, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        loss(torch.ones(student), torch.ones(teacher))


def test_half_a_regressor_is_refused():
    with pytest.raises(ValueError, match='both in_channels and out_channels, or none'):
        HintLoss(in_channels=3)
