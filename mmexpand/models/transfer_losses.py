"""Losses between a student and its teacher (Sec. 4.1): KD, hint and PKT.

Each loss is a module that takes the student's tensor and the teacher's, and returns a number.
``DistillHook`` takes any registered loss of this form.
"""

import math

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserValueError

EPS = 1e-7
"""Added to norms and probabilities, as in PKT's code."""


@MODELS.register_module()
class KDLoss(nn.Module):
    """Knowledge distillation: distance of both networks' softened probabilities.

    ``tau ** 2`` times the Kullback-Leibler divergence of the student's softmax at temperature
    ``tau`` from the teacher's, the mean over images, pixels and anchors. A teacher's map of another
    size is resized to the student's.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, Sec. 2.

    Args:
        tau: the temperature.
        loss_weight: the weight of the loss.
        num_anchors: number of anchors, whose channels follow each other in a detector's map.
        num_classes: number of class scores, the last channels of each anchor; None: all channels.
    """

    def __init__(
        self,
        tau: float = 4.0,
        loss_weight: float = 1.0,
        num_anchors: int = 1,
        num_classes: int | None = None,
    ):
        super().__init__()
        self.tau, self.loss_weight = tau, loss_weight
        self.num_anchors, self.num_classes = num_anchors, num_classes

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of logits ``(N, C)``, or of maps ``(N, C, H, W)``.

        Raises:
            ValueError: if the networks have different numbers of classes.
        """
        if student.shape[1] != teacher.shape[1]:
            raise UserValueError(
                f'the student gives {student.shape[1]} scores and the teacher {teacher.shape[1]}; '
                'use a teacher with the same classes'
            )
        teacher = _resized(teacher, student)
        student, teacher = (self._scores(logits) / self.tau for logits in (student, teacher))
        log_p, log_q = teacher.log_softmax(2), student.log_softmax(2)
        divergence = (log_p.exp() * (log_p - log_q)).sum(2)
        return self.loss_weight * self.tau**2 * divergence.mean()

    def _scores(self, logits: Tensor) -> Tensor:
        """Return scores by image and anchor: ``(N, num_anchors, num_classes, ...)``."""
        if logits.shape[1] % self.num_anchors:
            raise UserValueError(
                f'{logits.shape[1]} channels cannot be divided among {self.num_anchors} anchors; '
                'set num_anchors of the head'
            )
        by_anchor = logits.unflatten(1, (self.num_anchors, -1))
        if self.num_classes is None:
            return by_anchor
        if self.num_classes > by_anchor.shape[2]:
            raise UserValueError(
                f'num_classes={self.num_classes} of KDLoss is more than the {by_anchor.shape[2]} '
                'channels of an anchor: use the number of classes of the head'
            )
        return by_anchor[:, :, -self.num_classes :]


@MODELS.register_module()
class HintLoss(nn.Module):
    """Hint-based transfer: distance of features, the student's mapped by a linear regressor.

    Half the mean squared difference. With ``in_channels`` and ``out_channels`` a regressor, a 1x1
    convolution (a linear layer for vectors), is trained with the student; FitNets train it in a
    stage before. A teacher's map of another size is resized to the student's.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, Eq. 3.

    Args:
        in_channels: channels of the student's features; None: no regressor.
        out_channels: channels of the teacher's features.
        loss_weight: the weight of the loss.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        out_channels: int | None = None,
        loss_weight: float = 1.0,
    ):
        super().__init__()
        if (in_channels is None) != (out_channels is None):
            raise UserValueError('a regressor requires both in_channels and out_channels, or none')
        self.loss_weight = loss_weight
        self.regressor = None if in_channels is None else Regressor(in_channels, out_channels)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of features ``(N, C)`` or ``(N, C, H, W)``.

        Raises:
            ValueError: if channels do not fit the regressor, or differ without one.
        """
        found = student.shape[1], teacher.shape[1]
        made_for = found[:1] * 2 if self.regressor is None else self.regressor.channels
        if found != made_for:
            raise UserValueError(
                f'the student has {found[0]} channels and the teacher {found[1]}; set '
                f'in_channels={found[0]}, out_channels={found[1]}'
            )
        if self.regressor is not None:
            student = self.regressor(student)
        teacher = _resized(teacher, student)
        return self.loss_weight * 0.5 * F.mse_loss(student, teacher)


class Regressor(nn.Module):
    """A linear map over channels.

    It is not a subclass of a convolution, so that neither an expansion nor an ``init_cfg`` takes it
    for a layer of the network.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.channels = in_channels, out_channels
        bound = 1 / math.sqrt(in_channels)  # nn.Linear's initialisation.
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map features ``(N, in_channels, ...)``."""
        return F.linear(x.movedim(1, -1), self.weight, self.bias).movedim(-1, 1)


@MODELS.register_module()
class PKTLoss(nn.Module):
    """Probabilistic knowledge transfer: distance of the similarities within a batch.

    The cosine similarities of a batch's images, scaled to [0, 1], are made probabilities by row;
    the Kullback-Leibler divergence of the student's from the teacher's is averaged over rows.
    Features of any sizes can be compared. (The authors' code averages over all pairs, which is the
    same divided by the size of the batch.)

    Source: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge
    Transfer", ECCV 2018, Sec. 3.

    Args:
        loss_weight: the weight of the loss.
    """

    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
        self.loss_weight = loss_weight
        self._compared = False

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of features ``(N, ...)``; 0 for one image, as an epoch's last batch.

        Raises:
            ValueError: if the first batch is a single image, which has no neighbours.
        """
        if len(student) < 2 and not self._compared:
            raise UserValueError(
                'PKT compares the images of a batch, and this batch has one; use at least 2'
            )
        self._compared = True
        p, q = _neighbours(teacher), _neighbours(student)
        divergence = (p * ((p + EPS) / (q + EPS)).log()).sum(1)
        return self.loss_weight * divergence.mean()


def _neighbours(features: Tensor) -> Tensor:
    """Return for each image the probability that each image of the batch is its neighbour."""
    unit = F.normalize(features.flatten(1), eps=EPS)
    similarity = (unit @ unit.T + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)


def _resized(teacher: Tensor, student: Tensor) -> Tensor:
    """Return a teacher's map at the size of the student's."""
    if teacher.dim() != student.dim():
        raise UserValueError(
            f'the student gives {tuple(student.shape)} and the teacher {tuple(teacher.shape)}: '
            'name modules that both give vectors, or both maps'
        )
    if teacher.shape[2:] == student.shape[2:]:
        return teacher
    return F.interpolate(teacher, student.shape[2:], mode='bilinear', align_corners=False)
