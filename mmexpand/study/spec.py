"""The content of a study: arms, seeds, learning rates and metric, read and checked."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..core.names import near_matches
from ..errors import UserError
from ..mm.config_file import is_packaged

KEYS = {
    'arms': dict,
    'baseline': str,
    'metric': str,
    'seeds': (list, tuple),
    'tune_seeds': (list, tuple),
    'results_dir': str,
}
"""Required keys of a study file, with their types."""

OPTIONS = dict(lrs='auto', jobs=1, threads=1, channels_last=False)
"""Optional keys of a study file, with their defaults."""

ARM_KEYS = {'config', 'cfg_options', 'lr', 'seeds'}


class StudyError(UserError, ValueError):
    """A study that cannot run; the message names the key or arm, and the fix."""


@dataclass(frozen=True)
class Arm:
    """One of the configs that are compared.

    Attributes:
        name: its key in ``arms``.
        config: path of its config, or a name like ``mmdet::yolox/yolox_tiny_8xb8-300e_coco.py``.
        cfg_options: overrides of the config, as in ``--cfg-options``.
        lr: a fixed learning rate; None: the best of the grid.
        seeds: seeds of its reported runs, by default the study's.
    """

    name: str
    config: str
    cfg_options: dict[str, Any]
    lr: float | None
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """One training: an arm, a learning rate, a seed."""

    arm: Arm
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Return the name of its folder and its result file."""
        return f'lr{self.lr:g}_seed{self.seed}'

    def __str__(self) -> str:
        return f'{self.arm.name}, lr {self.lr:g}, seed {self.seed}'


@dataclass(frozen=True)
class Study:
    """The content of a study file.

    Attributes:
        path: the file.
        arms: the arms by name.
        baseline: the arm that the others are compared with.
        metric: a metric of the evaluators; larger is better.
        lrs: the grid of learning rates that every arm is tuned on, on the validation split; None
            (``'auto'`` in the file): each arm's rates are searched from its config's rate on.
        seeds: seeds of the runs at the best rate, which are reported on the test split.
        tune_seeds: seeds of the runs that tune the rates.
        results_dir: the folder of the result files, one JSON per run.
        jobs: number of runs at a time.
        threads: number of threads of each run.
        channels_last: whether networks have the channels last in memory.
    """

    path: Path
    arms: dict[str, Arm]
    baseline: str
    metric: str
    lrs: tuple[float, ...] | None
    seeds: tuple[int, ...]
    tune_seeds: tuple[int, ...]
    results_dir: Path
    jobs: int
    threads: int
    channels_last: bool

    @property
    def name(self) -> str:
        """Return the name of the file."""
        return self.path.stem

    @property
    def work_dir(self) -> Path:
        """Return the folder of logs and checkpoints."""
        return Path('work_dirs') / self.name

    def result_path(self, run: Run) -> Path:
        """Return the result file of a run."""
        return self.results_dir / run.arm.name / f'{run.name}.json'

    def arm(self, name: str) -> Arm:
        """Return the arm of this name.

        Raises:
            StudyError: if no arm has this name; the message gives near matches.
        """
        if name not in self.arms:
            raise StudyError(f'{self.path} has no arm {name!r}; {near_matches(name, self.arms)}')
        return self.arms[name]


def load_study(path: str | os.PathLike) -> Study:
    """Read and check a study.

    Args:
        path: a config with the keys ``KEYS`` and optionally ``OPTIONS``.

    Raises:
        FileNotFoundError: if the file does not exist.
        StudyError: if a key or an arm is wrong; the message names it.
    """
    path = Path(path)
    return check_study(path, Config.fromfile(path))


def check_study(path: Path, cfg: Config) -> Study:
    """Return the study of a file with this content.

    Raises:
        StudyError: see ``load_study``.
    """
    for key, kind in KEYS.items():
        if not isinstance(cfg.get(key), kind) or not cfg.get(key):
            expected = kind.__name__ if isinstance(kind, type) else 'list'
            raise StudyError(f'{path}: {key} must be a {expected}, not empty; got {cfg.get(key)!r}')
    for key in ('seeds', 'tune_seeds'):
        _check_numbers(path, key, cfg[key], int)
    options = {key: cfg.get(key, default) for key, default in OPTIONS.items()}
    lrs = _grid(path, options.pop('lrs'))
    for key in ('jobs', 'threads'):
        if not isinstance(options[key], int) or options[key] < 1:
            raise StudyError(
                f'{path}: {key} must be a whole number of at least 1, got {options[key]!r}'
            )
    arms = {name: _arm(path, name, arm, cfg.seeds) for name, arm in cfg.arms.items()}
    study = Study(
        path,
        arms,
        cfg.baseline,
        cfg.metric,
        lrs,
        tuple(cfg.seeds),
        tuple(cfg.tune_seeds),
        path.parent / cfg.results_dir,
        **options,
    )
    study.arm(study.baseline)
    return study


def _grid(path: Path, lrs: object) -> tuple[float, ...] | None:
    if lrs == 'auto':
        return None
    if not isinstance(lrs, list | tuple) or not lrs:
        raise StudyError(f"{path}: lrs must be 'auto' or a list, not empty; got {lrs!r}")
    _check_numbers(path, 'lrs', lrs, (int, float))
    return tuple(sorted(map(float, lrs)))


def _check_numbers(path: Path, key: str, values: Sequence, kind: type | tuple) -> None:
    if not all(isinstance(value, kind) for value in values):
        expected = 'whole numbers' if kind is int else 'numbers'
        raise StudyError(f'{path}: {key} must be {expected}, got {values!r}')
    if len(set(values)) < len(values):
        raise StudyError(f'{path}: {key} must not repeat a value, got {values!r}')
    if kind is not int and min(values) <= 0:
        raise StudyError(f'{path}: {key} must be above 0, got {values!r}')


def _arm(path: Path, name: str, arm: dict, default_seeds: Sequence[int]) -> Arm:
    named = isinstance(arm, dict) and isinstance(arm.get('config'), str)
    if not named or set(arm) - ARM_KEYS:
        raise StudyError(
            f'{path}: arms.{name} must be a dict with config, and may have cfg_options, lr and '
            f'seeds; got {", ".join(arm) if isinstance(arm, dict) else repr(arm)}'
        )
    lr, seeds = arm.get('lr'), arm.get('seeds')
    if lr is not None:
        _check_numbers(path, f'arms.{name}.lr', [lr], (int, float))
    if seeds is not None:
        if not isinstance(seeds, list | tuple) or not seeds:
            raise StudyError(f'{path}: arms.{name}.seeds must be a list of seeds, got {seeds!r}')
        _check_numbers(path, f'arms.{name}.seeds', seeds, int)
    if not isinstance(arm.get('cfg_options') or {}, dict):
        raise StudyError(
            f'{path}: arms.{name}.cfg_options must be a dict, got {arm["cfg_options"]!r}'
        )
    config = arm['config']
    if not is_packaged(config):
        config = str(path.parent / config)
    options = dict(arm.get('cfg_options') or {})
    return Arm(name, config, options, lr, tuple(default_seeds if seeds is None else seeds))
