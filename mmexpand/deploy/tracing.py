"""Patches of OpenMMLab that keep shapes dynamic while a graph is traced."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

SIZED = (
    'mmseg.models.utils.wrappers',
    'mmseg.models.backbones.swin',
    'mmdet.models.backbones.swin',
    'mmpretrain.models.utils.attention',
)
"""Modules that turn sizes into integers, which become constants in a trace."""
_adaptive_avg_pool2d = F.adaptive_avg_pool2d


@contextmanager
def open_sizes() -> Iterator[None]:
    """Keep sizes dynamic that are computed from sizes of inputs.

    These are mmseg's resizing, the batch size in Swin's windows, and the cells of pooling.
    """
    with ExitStack() as stack:
        for module in SIZED:
            if module in sys.modules:
                stack.enter_context(mock.patch(f'{module}.int', _int, create=True))
        stack.enter_context(mock.patch('torch.nn.functional.adaptive_avg_pool2d', _pool))
        yield


@contextmanager
def open_decoding(head: nn.Module) -> Iterator[None]:
    """Make the decoding of mmdet's heads traceable for any number of candidates."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch('mmcv.ops.nms.nms', _nms))
        # min(topk, number of candidates): slices end at the last candidate anyway.
        stack.enter_context(
            mock.patch('mmdet.models.utils.misc.min', lambda topk, _: topk, create=True)
        )
        if hasattr(head, 'bbox_coder'):
            coder = _Coder(head.bbox_coder)
            stack.enter_context(mock.patch.object(head, 'bbox_coder', coder))
        yield


class _Coder:
    """Box coder that ONNX can express, also for images without candidates.

    It clips out of place: slices clamped in place are lost in ONNX.
    """

    def __init__(self, coder: Any):
        self._coder = coder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coder, name)

    def decode(self, *args: Any, max_shape: tuple | None = None, **kwargs: Any) -> Tensor:
        if all(isinstance(arg, Tensor) and arg.dim() == 2 for arg in args):
            # One more row: ONNX cannot reshape an empty tensor to (0, -1), as mmdet does.
            args = tuple(torch.cat([arg, arg.new_zeros(1, arg.shape[1])]) for arg in args)
            boxes = self._coder.decode(*args, **kwargs)[:-1]
        else:
            boxes = self._coder.decode(*args, **kwargs)
        if max_shape is None or not self._coder.clip_border:
            return boxes
        height, width = max_shape
        limit = torch.stack([width, height, width, height]).to(boxes)
        return torch.minimum(boxes.clamp(min=0), limit)


def _nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, max_num: int = -1
) -> tuple[Tensor, Tensor]:
    """Run mmcv's suppression by torchvision's operator, which ONNX has."""
    keep = nms(boxes, scores, iou_threshold)
    keep = keep[:max_num] if max_num > 0 else keep
    return torch.cat([boxes[keep], scores[keep, None]], 1), keep


def _int(size: Any) -> Any:
    return size.long() if isinstance(size, Tensor) else int(size)


def _pool(features: Tensor, output_size: int | tuple[int | None, ...]) -> Tensor:
    """Pool adaptively; ONNX's operator requires equal cells and a fixed size."""
    cells = output_size if isinstance(output_size, (list, tuple)) else (output_size,) * 2
    if tuple(cells) == (1, 1):
        return _adaptive_avg_pool2d(features, 1)
    for dim, count in zip((2, 3), cells, strict=True):
        if count is not None:
            features = _pool_along(features, dim, count)
    return features


def _pool_along(features: Tensor, dim: int, count: int) -> Tensor:
    size = features.shape[dim]
    cells = []
    for index in range(count):
        start, end = (index * size) // count, ((index + 1) * size + count - 1) // count
        cell = features[:, :, start:end] if dim == 2 else features[:, :, :, start:end]
        cells.append(cell.mean(dim, keepdim=True))
    return torch.cat(cells, dim)
