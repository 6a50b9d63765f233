"""Traceable decoding of a model's raw outputs by its own head."""

import torch
from torch import Tensor, nn

from ..core.compat import tree_flatten, tree_unflatten
from ..errors import ExportError, UserValueError
from ..mm.logs import log
from ..mm.models import selects_by_score
from ..surgery import is_expanded
from .tracing import open_decoding

MAX_DETECTIONS = 300
"""Boxes per image if ``test_cfg`` has no ``max_per_img``."""


class Boxes(nn.Module):
    """Decoding and suppression of a single-stage detector, for one image.

    Args:
        model: the detector, whose head's ``predict_by_feat`` decodes.
        inputs: a preprocessed image.
    """

    names = ('boxes', 'scores', 'labels')
    per_image = True

    def __init__(self, model: nn.Module, inputs: Tensor):
        super().__init__()
        self.head = model.bbox_head
        self.structure = tree_flatten(model(inputs, mode='tensor'))[1]
        self.cfg = self.head.test_cfg.copy()
        suppression = self.cfg.get('nms') or {}
        if suppression.get('type', 'nms') != 'nms':
            raise ExportError(
                f'test_cfg.nms.type is {suppression["type"]!r}, for which ONNX has no operator; '
                "use 'nms', or export the raw outputs (--raw)"
            )
        # With many boxes, suppression would loop over the classes.
        self.cfg.nms = dict(suppression, split_thr=float('inf'))
        self.count = self.cfg.get('max_per_img', -1)
        if self.count < 1:  # mmdet's value for no limit is -1.
            log(
                f'The file gives at most {MAX_DETECTIONS} boxes: test_cfg.max_per_img sets no limit'
            )
            self.count = MAX_DETECTIONS

    def example(self, raw: list[Tensor]) -> list[Tensor]:
        """Return random outputs to trace with, which contain detections for all weights."""
        generator = torch.Generator().manual_seed(0)
        return [3 * torch.randn(output[:1].shape, generator=generator) for output in raw]

    def forward(self, size: Tensor, *raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decode.

        Args:
            size: height and width of the input.
            *raw: the head's outputs for one image.

        Returns:
            Boxes (x1, y1, x2, y2) in pixels of the input, shape (K, 4), scores (K,) and labels
            (K,), best first; padding has score 0 and label -1.
        """
        outputs = tree_unflatten(list(raw), self.structure)
        meta = dict(img_shape=(size[0], size[1]))
        with open_decoding(self.head):
            (found,) = self.head.predict_by_feat(*outputs, batch_img_metas=[meta], cfg=self.cfg)
        more = set(found.keys()) - {'bboxes', 'scores', 'labels'}
        if more:
            raise ExportError(
                f'{type(self.head).__name__} predicts {", ".join(sorted(more))} too, which only '
                'the raw outputs hold: export those (--raw)'
            )
        return (
            _fill(found.bboxes, self.count, 0),
            _fill(found.scores, self.count, 0),
            _fill(found.labels, self.count, -1),
        )


class Classes(nn.Module):
    """Decoding of a segmentor by its own head: the class of every pixel of the input.

    Args:
        model: the segmentor.
        inputs: a preprocessed image.
    """

    names = ('classes',)
    per_image = False

    def __init__(self, model: nn.Module, inputs: Tensor):
        super().__init__()
        self.head = model.decode_head
        if model.test_cfg.get('mode') == 'slide':
            raise ExportError(
                "test_cfg.mode is 'slide', but the file runs on whole images; set --cfg-options "
                'model.test_cfg.mode=whole, and evaluate the network in this mode'
            )
        if isinstance(self.head, nn.ModuleList):
            raise ExportError(
                f'{type(model).__name__} has several heads, whose predictions cannot be put into '
                'the file: export the raw outputs (--raw)'
            )

    def example(self, raw: list[Tensor]) -> list[Tensor]:
        """Return outputs to trace with."""
        return raw

    def forward(self, size: Tensor, logits: Tensor, *_: Tensor) -> Tensor:
        """Return the classes, shape (N, H, W); of several outputs (EncNet's) the first counts."""
        return classes_of(self.head, self.resized(size, logits))

    def resized(self, size: Tensor, logits: Tensor) -> Tensor:
        """Return the logits at the size of the input."""
        meta = dict(img_shape=(size[0], size[1]))
        return self.head.predict_by_feat(logits, [meta])


class Logits(Classes):
    """Decoding of a segmentor to the logits of every pixel, shape (N, C, H, W)."""

    names = ('logits',)

    def forward(self, size: Tensor, logits: Tensor, *_: Tensor) -> Tensor:
        """Resize the logits to the size of the input."""
        return self.resized(size, logits)


def classes_of(head: nn.Module, logits: Tensor) -> Tensor:
    """Return the class of every pixel; a single channel is compared with the head's threshold.

    Args:
        head: the head of a segmentor.
        logits: logits of shape (N, C, H, W).
    """
    if logits.shape[1] == 1:
        return (logits.sigmoid() > head.threshold).squeeze(1).long()
    return logits.argmax(1)


def decoder_of(
    model: nn.Module, inputs: Tensor, logits: bool = False
) -> Boxes | Classes | Logits | None:
    """Return the module that decodes the raw outputs of a model; None for a classifier.

    Args:
        model: a compact model in eval mode.
        inputs: a preprocessed image.
        logits: whether to give a segmentor's logits instead of classes.

    Raises:
        ExportError: if a file cannot hold such predictions.
    """
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if logits and 'EncoderDecoder' not in kinds:
        raise ExportError(
            f'--logits requires an EncoderDecoder, got {type(model).__name__}; remove --logits'
        )
    if 'SingleStageDetector' in kinds and hasattr(model, 'bbox_head'):
        return Boxes(model, inputs)
    if 'EncoderDecoder' in kinds:
        return (Logits if logits else Classes)(model, inputs)
    if 'BaseDetector' in kinds or 'BaseSegmentor' in kinds:
        raise ExportError(
            f'{type(model).__name__} is neither a single-stage detector with a bbox_head nor an '
            'EncoderDecoder, so its predictions cannot be put into the file; export the raw '
            'outputs (--raw)'
        )
    return None


def check_exportable(model: nn.Module) -> None:
    """Check that a model is compact and has one stage.

    Raises:
        ValueError: if the model is expanded.
        ExportError: if it is a two-stage detector.
    """
    if is_expanded(model):
        raise UserValueError('the model is expanded; contract it first: mmexpand.contract(model)')
    if selects_by_score(model):
        raise ExportError(
            f'{type(model).__name__} has two stages, and its proposals are chosen inside; '
            'only single-stage detectors, segmentors and classifiers can be exported'
        )


def predict(model: nn.Module, inputs: Tensor) -> list[dict[str, Tensor]]:
    """Return the framework's own predictions for each image, by the names of the decoders.

    Args:
        model: a single-stage detector or an EncoderDecoder.
        inputs: preprocessed images of one size, without padding.
    """
    size = tuple(inputs.shape[-2:])
    if not hasattr(model, 'bbox_head'):
        return [dict(classes=s.pred_sem_seg.data[0]) for s in model.predict(inputs)]
    from mmdet.structures import DetDataSample

    meta = dict(
        img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1, 1)
    )
    samples = [DetDataSample(metainfo=meta) for _ in inputs]
    found = [s.pred_instances for s in model.predict(inputs, samples, rescale=False)]
    return [dict(boxes=f.bboxes, scores=f.scores, labels=f.labels) for f in found]


def _fill(values: Tensor, count: int, value: float) -> Tensor:
    filler = values.new_full((count, *values.shape[1:]), value)
    return torch.cat([values, filler])[:count]
