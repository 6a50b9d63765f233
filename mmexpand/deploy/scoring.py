"""Evaluation of PyTorch and of files by the config's evaluator."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from torch import nn

from ..errors import ExportError, UserValueError
from ..markdown import markdown_table
from ..metrics import best_metric, is_main
from ..mm.compact_config import make_compact_config
from ..mm.evaluation import evaluate
from ..mm.launch import build_runner, temporary_work_dir
from ..mm.logs import log
from .comparison import detections
from .network import Pixels, file_images
from .runtimes import Run


class FileModel(nn.Module):
    """A file with decoding, as a model that mmengine's loops can run.

    Args:
        model: the exported model, for its data preprocessor.
        run: runs the file.
        names: names of its outputs; the model's own postprocessing turns logits into classes.
            A file of a classifier has raw outputs.
        size: height and width of its input; None if any.
        pixels: the pixels that it takes; None if it takes preprocessed images.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        names: tuple[str, ...],
        size: tuple[int, int] | None = None,
        pixels: Pixels | None = None,
    ):
        super().__init__()
        self.data_preprocessor = model.data_preprocessor
        self.postprocess = getattr(model, 'postprocess_result', None)
        self.predictions = getattr(model, 'predictions', None)
        self.clips = _clips(getattr(model, 'bbox_head', None))
        self.run, self.names, self.size, self.pixels = run, names, size, pixels

    def val_step(self, data: dict) -> list[Any]:
        """Predict a batch of a data loader.

        Raises:
            ValueError: if the file takes images of another size.
        """
        data = self.data_preprocessor(data, False)
        images = data['inputs'].cpu()
        size = tuple(images.shape[-2:])
        if self.size not in (None, size):
            raise UserValueError(
                f'the file takes images of {_shown(self.size)}, but the split has one of '
                f'{_shown(size)}: export with --dynamic-size'
            )
        outputs = self.run(file_images(images, self.pixels).numpy())
        if self.predictions is not None:
            return self.predictions(torch.from_numpy(outputs[0]), data['labels'])
        if self.names == ('logits',):
            return self.postprocess(torch.from_numpy(outputs[0]), data['data_samples'])
        for index, sample in enumerate(data['data_samples']):
            predicted = {n: o[index] for n, o in zip(self.names, outputs, strict=True)}
            if self.names == ('classes',):
                _put_classes(sample, predicted)
            else:
                _put_boxes(sample, predicted, self.clips)
        return data['data_samples']


def score(cfg: Config, models: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """Return the metrics of each model, by its name, on the test split of a config."""
    with scorer(cfg, 'test') as metrics:
        return {name: metrics(model) for name, model in models.items()}


@contextmanager
def scorer(cfg: Config, split: str) -> Iterator[Callable[[nn.Module], dict[str, Any]]]:
    """Yield a function from a model to its metrics on a split of the config.

    Args:
        cfg: the expanded or the compact config.
        split: 'val' or 'test'.
    """
    cfg = make_compact_config(cfg)
    cfg.val_dataloader, cfg.val_evaluator = cfg[f'{split}_dataloader'], cfg[f'{split}_evaluator']
    cfg.val_cfg = dict(type='ValLoop')
    for split in ('train', 'test'):
        for key in ('dataloader', 'cfg', 'evaluator'):
            cfg.pop(f'{split}_{key}', None)
    for key in ('optim_wrapper', 'param_scheduler', 'auto_scale_lr'):
        cfg.pop(key, None)
    with temporary_work_dir(cfg):
        runner = build_runner(cfg, ('val',))
        yield lambda model: evaluate(model, runner)


def main_metric(cfg: Config, metrics: Mapping[str, Any]) -> str:
    """Return the main metric: that of ``save_best``, or else the usual one.

    Args:
        cfg: a config, whose checkpoint hook may name the metric.
        metrics: metrics of the float32 network.

    Raises:
        ExportError: if no metric exists, as after no detection.
    """
    numbers = [name for name, value in metrics.items() if isinstance(value, (int, float))]
    if not numbers:
        raise ExportError(
            'the float32 network has no metric to compare int8 with: it predicts nothing, or the '
            'evaluator returns no number; train it for longer, or check the evaluator'
        )
    best = best_metric(cfg)
    return best if best in numbers else [*filter(is_main, numbers), *numbers][0]


def points_lost(metric: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Return the points that a metric has lost: hundredths for a metric that is a share.

    Args:
        metric: the name of the metric.
        before: metrics in float32.
        after: metrics in int8; a missing metric means no detection.
    """
    unit = 100 if before[metric] <= 1 else 1  # mmdet gives shares, mmseg percentages.
    return unit * (before[metric] - after.get(metric, 0))


@contextmanager
def metric_kept(
    cfg: Config, drop: float, float32: Path, load: Callable[[Path], nn.Module]
) -> Iterator[Callable[[Path], bool]]:
    """Yield a function from an int8 file to whether it keeps the metric on the val split.

    Args:
        cfg: the expanded or the compact config.
        drop: points of the main metric that int8 may lose.
        float32: the float32 file.
        load: returns the model of a file.
    """
    with scorer(cfg, 'val') as metrics:
        before = metrics(load(float32))
        metric = main_metric(cfg, before)
        log(f'int8 auto: {metric} {before[metric]:.4f} in float32 on the validation split')

        def accepts(path: Path) -> bool:
            after = metrics(load(path))
            lost = points_lost(metric, before, after)
            log(f'int8 auto: {metric} {after.get(metric, 0):.4f}, {lost:.2f} points lost')
            return lost <= drop

        yield accepts


def table(rows: dict[str, dict[str, Any]], sizes: dict[str, int]) -> str:
    """Return a Markdown table: one row per model, with its metrics and the size of its file."""
    found = {n: v for row in rows.values() for n, v in row.items() if isinstance(v, (int, float))}
    metrics = list(found)
    lines = []
    for model, values in rows.items():
        # CocoMetric gives no metric after no detection.
        cells = [f'{values[name]:.4g}' if name in values else '-' for name in metrics]
        lines.append([model, *cells, f'{sizes[model] / 1e6:.2f}'])
    return markdown_table(['', *metrics, 'MB'], lines)


def _clips(head: nn.Module | None) -> bool:
    """Return whether a detection head clips boxes to the image. YOLOX and YOLOv3 do not."""
    coder = getattr(head, 'bbox_coder', None)
    return getattr(head, 'clip_border', getattr(coder, 'clip_border', False))


def _put_boxes(sample: Any, predicted: dict[str, np.ndarray], clips: bool) -> None:
    found = {name: torch.from_numpy(v) for name, v in detections(predicted).items()}
    boxes = found['boxes']
    if clips:  # The file clips to the padded image.
        height, width = sample.metainfo['img_shape'][:2]
        boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height]))
    scale = torch.tensor(sample.metainfo.get('scale_factor', (1.0, 1.0))[:2]).repeat(2)
    sample.pred_instances = InstanceData(
        bboxes=(boxes / scale).float(), scores=found['scores'], labels=found['labels']
    )


def _put_classes(sample: Any, predicted: dict[str, np.ndarray]) -> None:
    meta = sample.metainfo
    left, right, top, bottom = meta.get('img_padding_size', meta.get('padding_size', [0] * 4))
    classes = torch.from_numpy(predicted['classes'])
    height, width = classes.shape
    inside = classes[top : height - bottom, left : width - right].float()
    resized = F.interpolate(inside[None, None], size=tuple(meta['ori_shape'][:2]))
    sample.pred_sem_seg = PixelData(data=resized[0].long())


def _shown(size: tuple[int, int]) -> str:
    return f'{size[0]}x{size[1]}'
