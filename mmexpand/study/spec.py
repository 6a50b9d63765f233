"""What a study is: arms, seeds, learning rates, and the metric, read from a config and checked."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

KEYS = {
    'arms': dict,
    'baseline': str,
    'metric': str,
    'lrs': (list, tuple),
    'seeds': (list, tuple),
    'tune_seeds': (list, tuple),
    'results_dir': str,
}
"""What every STUDY.py holds."""

OPTIONS = dict(jobs=1, threads=1, channels_last=False)
"""What it may hold besides, and its values otherwise."""


class StudyError(ValueError):
    """A study that cannot be run; the message names the key or arm, and the way out."""


@dataclass(frozen=True)
class Arm:
    """One of the configs that are compared.

    Attributes:
        name: its key in ``arms``.
        config: path of its config.
        cfg_options: what is overridden in it, as ``--cfg-options`` would.
        lr: a fixed learning rate; None: the best of the grid.
        seeds: None: the study's.
    """

    name: str
    config: Path
    cfg_options: dict[str, Any]
    lr: float | None = None
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Run:
    """One training: an arm, a learning rate, a seed."""

    arm: Arm
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and its result file."""
        return f'lr{self.lr:g}_seed{self.seed}'

    def __str__(self) -> str:
        return f'{self.arm.name}, lr {self.lr:g}, seed {self.seed}'


@dataclass(frozen=True)
class Study:
    """What a STUDY.py says.

    Attributes:
        path: the file.
        arms: by name.
        baseline: the arm that the others are compared with.
        metric: a name that the evaluators give; larger is better.
        lrs: the grid of learning rates that every arm is tuned on, at the validation split.
        seeds: that every arm is trained with at its best rate, reported at the test split.
        tune_seeds: that the rates are tuned with.
        results_dir: where one JSON a run is written.
        jobs: how many runs at a time.
        threads: of every run.
        channels_last: whether networks are laid out with the channels last.
    """

    path: Path
    arms: dict[str, Arm]
    baseline: str
    metric: str
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    tune_seeds: tuple[int, ...]
    results_dir: Path
    jobs: int
    threads: int
    channels_last: bool

    @property
    def name(self) -> str:
        """The file's."""
        return self.path.stem

    @property
    def work_dir(self) -> Path:
        """Where runs keep logs and checkpoints."""
        return Path('work_dirs') / self.name

    def result_path(self, run: Run) -> Path:
        """The result file of a run."""
        return self.results_dir / run.arm.name / f'{run.name}.json'

    def arm(self, name: str) -> Arm:
        """The arm of this name.

        Raises:
            StudyError: naming near matches, if there is none.
        """
        if name not in self.arms:
            near = difflib.get_close_matches(name, self.arms, n=3) or list(self.arms)
            raise StudyError(f'{self.path} has no arm {name!r}; near matches: {", ".join(near)}')
        return self.arms[name]


def load_study(path: str | os.PathLike) -> Study:
    """Read and check a study.

    Args:
        path: a config with the keys ``KEYS`` and, if need be, ``OPTIONS``.

    Raises:
        FileNotFoundError: if there is no such file.
        StudyError: naming the key or the arm.
    """
    path = Path(path)
    cfg = Config.fromfile(path)
    for key, kind in KEYS.items():
        if not isinstance(cfg.get(key), kind) or not cfg.get(key):
            expected = kind.__name__ if isinstance(kind, type) else 'list'
            raise StudyError(f'{path}: {key} must be a {expected}, not empty; got {cfg.get(key)!r}')
    for key in ('lrs', 'seeds', 'tune_seeds'):
        if not all(isinstance(value, (int, float)) for value in cfg[key]):
            raise StudyError(f'{path}: {key} must be numbers, got {cfg[key]!r}')
    arms = {name: _arm(path, name, arm) for name, arm in cfg.arms.items()}
    study = Study(
        path,
        arms,
        cfg.baseline,
        cfg.metric,
        tuple(sorted(float(lr) for lr in cfg.lrs)),
        tuple(cfg.seeds),
        tuple(cfg.tune_seeds),
        path.parent / cfg.results_dir,
        **{key: cfg.get(key, default) for key, default in OPTIONS.items()},
    )
    study.arm(study.baseline)
    return study


def _arm(path: Path, name: str, arm: dict) -> Arm:
    unknown = set(arm) - {'config', 'cfg_options', 'lr', 'seeds'}
    if unknown or 'config' not in arm:
        raise StudyError(
            f'{path}: arms.{name} must have config and may have cfg_options, lr and seeds; got '
            f'{", ".join(arm)}'
        )
    config = path.parent / arm['config']
    if not config.is_file():
        raise StudyError(f'{path}: arms.{name}.config not found; looked for {config.resolve()}')
    seeds: Sequence[int] | None = arm.get('seeds')
    options = dict(arm.get('cfg_options') or {})
    return Arm(name, config, options, arm.get('lr'), None if seeds is None else tuple(seeds))
