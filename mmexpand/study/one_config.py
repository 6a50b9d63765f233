"""A study of one config and some blocks, without a study file written by hand."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pprint import pformat
from typing import Any

from mmengine.config import Config

from ..files import write_text
from ..metrics import best_metric
from ..mm.compact_config import plain, type_name
from ..mm.config_file import is_packaged, open_config
from ..mm.models import configured_expansions, expansion_options
from .rates import final_runs
from .results import load_result, score
from .spec import Run, Study, StudyError, check_study, load_study

BASELINE = 'compact'

METRICS = {
    'CocoMetric': ('coco', 'bbox_mAP', ('metric', 'bbox')),
    'VOCMetric': ('pascal_voc', 'mAP', ('metric', 'mAP')),
    'IoUMetric': ('', 'mIoU', ('iou_metrics', 'mIoU')),
    'Accuracy': ('accuracy', 'top1', ('topk', 1)),
    'TopAccuracy': ('', 'accuracy', None),
}
"""The main metric of an evaluator, by its type: prefix, name, and the option that it requires."""


@dataclass(frozen=True)
class OneConfig:
    """A config that is trained as it is and with each of some blocks.

    Attributes:
        config: path of a config that expands nothing, or a name like ``mmdet::...``.
        methods: the blocks; each is an arm beside the baseline ``compact``.
        seeds: seeds of the reported runs; the first also tunes the learning rates. None: those of
            the study so far, or 0, 1 and 2.
        metric: the metric to compare by; None: that of the study so far, or see ``METRICS``.
        lrs: learning rates to try with every arm; None: those of the study so far, or a search
            (see ``rates``).
        expansion: other options of ``ExpandHook``, the same for all blocks.
        cfg_options: overrides of the config, the same for all arms.
        jobs: runs at a time.
        name: the study and its folder in ``work_dirs``; None: ``CONFIG_study``.
    """

    config: str
    methods: Sequence[str]
    seeds: Sequence[int] | None = None
    metric: str | None = None
    lrs: Sequence[float] | None = None
    expansion: Mapping[str, Any] = field(default_factory=dict)
    cfg_options: Mapping[str, Any] = field(default_factory=dict)
    jobs: int = 1
    name: str | None = None


def study_of(asked: OneConfig) -> Study:
    """Write the study file of one config, and load it.

    A study of this name continues if its arms are equal; arms, rates and seeds may be added.

    Raises:
        ConfigError: if the config cannot be read.
        ValueError: for an unknown method, or an option that it does not support.
        StudyError: if the config expands already, if its metric is unknown, or if a study of that
            name has an arm with other options.
    """
    cfg = open_config(asked.config, dict(asked.cfg_options), option='--cfg-options')
    if configured_expansions(cfg):
        raise StudyError(f'{asked.config} expands already; name the config of the compact network')
    name = asked.name or f'{Path(asked.config).stem}_study'
    if Path(name).name != name:
        raise StudyError(f'--name {name} must be a folder name without a path, such as my_study')
    path = Path('work_dirs') / name / f'{name}.py'
    config = asked.config if is_packaged(asked.config) else os.path.abspath(asked.config)
    arms = {BASELINE: dict(config=config, cfg_options=dict(asked.cfg_options))}
    for method in asked.methods:
        options = expansion_options(cfg, dict(asked.expansion, method=method))
        arms[method] = dict(config=config, cfg_options={**asked.cfg_options, **options})
        # Errors before the file is written.
        configured_expansions(open_config(asked.config, arms[method]['cfg_options']))
    former = {}
    if path.is_file():
        former = Config.fromfile(path).to_dict()
        arms = {**_former_arms(path, former['arms'], arms), **arms}
    seeds = list(asked.seeds or former.get('seeds', (0, 1, 2)))
    content = dict(
        arms=arms,
        baseline=BASELINE,
        metric=asked.metric or former.get('metric') or _main_metric(cfg, asked.config),
        lrs=list(asked.lrs) if asked.lrs else former.get('lrs', 'auto'),
        seeds=seeds,
        tune_seeds=seeds[:1],
        results_dir='results',
        jobs=asked.jobs,
        threads=max(1, (os.cpu_count() or 1) // asked.jobs),
    )
    check_study(path, Config(copy.deepcopy(content)))  # It may replace a former one.
    path.parent.mkdir(parents=True, exist_ok=True)
    # Config.dump would sort the arms.
    lines = [f'{k} = {pformat(plain(v, k), sort_dicts=False)}\n' for k, v in content.items()]
    write_text(''.join(lines), path)
    return load_study(path)


def _main_metric(cfg: Config, config: str) -> str:
    best = best_metric(cfg)
    if best is not None:
        return best
    evaluators = cfg.get('val_evaluator') or []
    evaluators = evaluators if isinstance(evaluators, list | tuple) else [evaluators]
    known = [name for name in map(_metric_of, evaluators) if name]
    if not known:
        kinds = ', '.join(str(type_name(evaluator)) for evaluator in evaluators) or 'no evaluator'
        raise StudyError(
            f'the main metric of {config} is unknown ({kinds}); name one with --metric, as the '
            'evaluator logs it'
        )
    return known[0]


def _metric_of(evaluator: Mapping) -> str | None:
    """Return the main metric as an evaluator logs it; None if it is unknown."""
    prefix, name, required = METRICS.get(type_name(evaluator), ('', None, None))
    if required:
        option, value = required
        given = evaluator.get(option, value)
        if value not in (given if isinstance(given, list | tuple) else [given]):
            return None
    prefix = evaluator.get('prefix') or prefix
    return f'{prefix}/{name}' if prefix and name else name


def _former_arms(path: Path, before: dict[str, dict], arms: Mapping[str, dict]) -> dict[str, dict]:
    """Return the arms of a study file; refuse other options under the same name."""
    both = before.keys() & arms.keys()
    changed = [name for name in arms if name in both and _plain(before[name]) != _plain(arms[name])]
    if changed:
        raise StudyError(
            f'{path} has other options for {", ".join(changed)}; choose another --name, or remove '
            'its folder'
        )
    return before


def _plain(arm: Mapping) -> dict:
    """Return an arm with nested options: keys with dots mean the same."""
    options = Config()
    options.merge_from_dict(copy.deepcopy(dict(arm.get('cfg_options') or {})))
    return dict(config=arm['config'], cfg_options=options.to_dict())


def best_checkpoint(study: Study) -> tuple[Run, Path] | None:
    """Return the run with the best metric on the validation split, and its compact checkpoint.

    Return None if no run has ended, or its checkpoint was removed.
    """
    finals = [run for arm in study.arms.values() for run in final_runs(study, arm)]
    scored = [(score(study, load_result(study, run), 'val'), run) for run in finals]
    ended = [(value, run) for value, run in scored if value is not None]
    if not ended:
        return None
    _, best = max(ended, key=lambda pair: pair[0])
    folder = study.work_dir / best.arm.name / best.name
    # The averaged weights are evaluated if EMAHook is on.
    averaged = folder / 'compact_ema.pth'
    path = averaged if averaged.is_file() else folder / 'compact_last.pth'
    latest = folder / 'last_checkpoint'
    if best.arm.name == study.baseline and latest.is_file():
        path = Path(latest.read_text().strip())
    return (best, path) if path.is_file() else None
