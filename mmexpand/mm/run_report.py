"""The report of a work dir: compact networks, curves, costs and predictions."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import mmcv
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.registry import DATASETS
from mmengine.structures import BaseDataElement
from torch import Tensor

from ..analysis.complexity import network_costs
from ..core.eligibility import EXPANDED_ALREADY
from ..errors import UserValueError
from ..files import write_text
from ..report.curves import read_log
from ..report.gallery import (
    MEASURES,
    Boxes,
    Gallery,
    Picture,
    boxes_picture,
    class_colors,
    mask_picture,
)
from ..report.run import Cost, LayerRow, RunReport, WeightSet, render_run
from ..surgery import Plan, expand_
from ..surgery.checkpoint import META_KEY, get_state_dict, load_checkpoint
from ..surgery.verify import TOLERANCES
from ..version import __version__
from .contraction import has_model
from .datasets import check_datasets, evenly_spaced, guard_pipelines
from .models import build_compact_model, configured_expansions, selects_by_score, tensor_outputs
from .ranks import describe

REPORT_NAME = 'report.html'
PICTURES = 48
"""Largest number of pictures, which keeps the page with the charts' script below 8 MB."""


def write_run_report(
    work_dir: str | os.PathLike,
    cfg: Config,
    notes: list[str] | None = None,
    experiment_name: str | None = None,
) -> tuple[Path, list[str]]:
    """Write ``report.html`` into a work dir, from its files and the validation data.

    Args:
        work_dir: a folder with compact checkpoints and logs.
        cfg: the config that was trained.
        notes: sentences to add to the report's notes.
        experiment_name: name of the run whose compact networks are shown, beside the networks that
            tools/contract.py wrote; None for the newest run.

    Returns:
        The path of the page, and all its notes, which name the missing parts and the reasons.
    """
    work_dir, notes = Path(work_dir), list(notes or ())
    folder = work_dir.resolve().name
    title = Path(cfg.filename).stem if cfg.filename else folder
    about = [f'{datetime.now():%Y-%m-%d %H:%M}', f'mmexpand {__version__}']
    report = RunReport(title, [f'work dir {folder}', *about, f'torch {torch.__version__}'], notes)
    with _noted(notes, 'compact networks'):
        report.sets = _weight_sets(work_dir, experiment_name, notes)
    with _noted(notes, 'curves'):
        report.log = read_log(work_dir)
    if not has_model(cfg):
        notes.append('Costs and predictions: the Runner had no config of its model.')
    else:
        dataset = None
        with _noted(notes, 'predictions'):
            dataset = _build_dataset(cfg)
            report.gallery = _gallery(cfg, dataset, work_dir, report.chosen)
        with _noted(notes, 'costs'):
            report.cost = _cost(cfg, dataset)
    path = work_dir / REPORT_NAME
    write_text(render_run(report), path)
    return path, notes


@contextmanager
def _noted(notes: list[str], what: str) -> Iterator[None]:
    """Skip a part of the report that fails in this context, and add a note with the reason."""
    try:
        yield
    except Exception as error:
        notes.append(f'{what.capitalize()}: {describe(error)}')


def _weight_sets(work_dir: Path, experiment_name: str | None, notes: list[str]) -> list[WeightSet]:
    """Return the compact networks of one run; the work dir may hold earlier runs' too."""
    paths = sorted(work_dir.glob('compact_*.pth'))
    found = {path: load_checkpoint(path) for path in paths}
    foreign = [path for path, one in found.items() if META_KEY not in (one.get('meta') or {})]
    for path in foreign:
        notes.append(f'{path.name}: ContractHook has not written it.')
        paths.remove(path)
        del found[path]
    names = {path: one['meta'].get('experiment_name') for path, one in found.items()}
    if experiment_name is None:
        named = [path for path in paths if names[path]]
        experiment_name = names[max(named, key=os.path.getmtime)] if named else None
    notes += [
        f'{path.name}: it belongs to another run, {names[path]}.'
        for path in paths
        if names[path] not in (None, experiment_name)
    ]
    return [
        _weight_set(path, found[path]) for path in paths if names[path] in (None, experiment_name)
    ]


def _weight_set(path: Path, checkpoint: dict) -> WeightSet:
    weights = get_state_dict(checkpoint).values()
    dtype = next(w.dtype for w in weights if isinstance(w, Tensor) and w.is_floating_point())
    return WeightSet(
        path.stem.removeprefix('compact_'),
        path.name,
        path.stat().st_size / 1e6,
        TOLERANCES.get(dtype, TOLERANCES[torch.float32]),
        checkpoint['meta'][META_KEY],
    )


def _build_dataset(cfg: Config) -> Any:
    if cfg.get('val_dataloader') is None:
        raise UserValueError('the config has no validation data')
    check_datasets(cfg, ('val',))
    build_compact_model(cfg)  # It sets the default scope, in which the data set is built.
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    guard_pipelines(dataset)
    return dataset


def _cost(cfg: Config, dataset: Any) -> Cost:
    expansions = configured_expansions(cfg)
    if not expansions:
        raise UserValueError(
            'the config expands nothing: name the work dir of a training with ExpandHook'
        )
    compact = build_compact_model(cfg)
    compact.eval()
    expanded = build_compact_model(cfg)
    # Only shapes matter, so that the slow 'preserve' is not needed.
    plans = [
        (name, expand_(expanded.get_submodule(name), replace(expansion, init='default')))
        for name, expansion in expansions
    ]
    total, by_layer, size = None, {}, None
    if dataset is not None:
        data = compact.data_preprocessor(pseudo_collate([dataset[0]]), False)
        run = partial(tensor_outputs, compact, dict(inputs=data['inputs']))
        total, costs = network_costs(expanded, compact, run)
        by_layer = {n: (c.macs_compact, c.macs_layerwise, c.macs_auto) for n, c in costs.items()}
        if selects_by_score(compact):
            total = None  # The forward pass ends before the heads.
        size = tuple(data['inputs'].shape[-2:])
    rows, skipped = _rows(plans, by_layer)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (compact, expanded))
    return Cost(rows, skipped, before, after, total, size)


def _rows(
    plans: list[tuple[str, Plan]], macs: dict[str, tuple[int, int, int]]
) -> tuple[list[LayerRow], dict[str, list[str]]]:
    rows, reasons = [], {}
    for prefix, plan in plans:
        for layer in plan:
            name = f'{prefix}.{layer.name}'.lstrip('.')
            factors = ['x'.join(map(str, shape)) for shape in layer.factor_shapes]
            sizes = layer.params_before, layer.params_after
            rows.append(LayerRow(name, layer.label, factors, *sizes, macs.get(name)))
        for layer in plan.skipped:
            reasons[f'{prefix}.{layer.name}'.lstrip('.')] = layer.reason
    skipped: dict[str, list[str]] = {}
    for name in sorted(reasons.keys() - {row.name for row in rows}):
        skipped.setdefault(reasons[name], []).append(name)
    skipped.pop(EXPANDED_ALREADY, None)
    return rows, skipped


@torch.no_grad()
def _gallery(cfg: Config, dataset: Any, work_dir: Path, chosen: WeightSet | None) -> Gallery:
    if chosen is None:
        raise UserValueError('the work dir has no compact network')
    model = build_compact_model(cfg)
    model.load_state_dict(get_state_dict(load_checkpoint(work_dir / chosen.file)))
    model.to(get_device())
    model.eval()
    classes = [str(name) for name in dataset.metainfo.get('classes') or ()]
    if not classes:
        raise UserValueError('the data set has no class names: set its metainfo')
    colors = class_colors(dataset.metainfo.get('palette'), len(classes))
    pictures, kind = [], ''
    for index in evenly_spaced(len(dataset), PICTURES):
        (sample,) = model.test_step(pseudo_collate([dataset[index]]))
        kind = _kind(sample)
        pictures.append(_picture(kind, sample.to('cpu'), classes, colors))
    about = (
        f'{chosen.file} on {len(pictures)} of the {len(dataset)} images of the validation split.'
    )
    return Gallery(pictures, classes, colors, about, MEASURES[kind])


def _kind(sample: BaseDataElement) -> str:
    if 'pred_sem_seg' in sample and 'gt_sem_seg' in sample:
        return 'masks'
    if 'pred_instances' in sample and 'bboxes' in sample.get('gt_instances', ()):
        return 'boxes'
    raise UserValueError(
        'only boxes and semantic masks are supported; let the validation pipeline load their '
        'ground truth'
    )


def _picture(kind: str, sample: BaseDataElement, classes: list[str], colors: list) -> Picture:
    name = Path(sample.img_path).name
    image = mmcv.imread(sample.img_path, channel_order='rgb')
    if kind == 'masks':
        masks = (sample.get(key).data.squeeze(0).numpy() for key in ('gt_sem_seg', 'pred_sem_seg'))
        return mask_picture(name, image, *masks, colors)
    return boxes_picture(
        name,
        image,
        _boxes(sample.gt_instances),
        _boxes(sample.pred_instances),
        classes,
        _boxes(sample.ignored_instances) if 'ignored_instances' in sample else None,
    )


def _boxes(instances: BaseDataElement) -> Boxes:
    corners = getattr(instances.bboxes, 'tensor', instances.bboxes)
    scores = instances.scores.float().numpy() if 'scores' in instances else None
    return Boxes(corners.float().numpy().reshape(-1, 4), instances.labels.numpy(), scores)
