"""The scalars that mmengine logged while it trained."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from ..errors import UserFileNotFoundError, UserValueError
from ..metrics import is_main

Curve = tuple[list[int], list[float]]
"""Steps, in iterations, and values."""


@dataclass
class Log:
    """Logged scalars of a run, by name.

    Attributes:
        training: losses, learning rates, times.
        evaluations: metrics of the evaluators.
    """

    training: dict[str, Curve] = field(default_factory=dict)
    evaluations: dict[str, Curve] = field(default_factory=dict)

    @property
    def losses(self) -> dict[str, Curve]:
        """Return the total loss, then its parts."""
        names = [name for name in self.training if 'loss' in name]
        return {name: self.training[name] for name in sorted(names, key=lambda n: n != 'loss')}

    @property
    def metrics(self) -> dict[str, Curve]:
        """Return the metrics of the evaluators, the main ones first."""
        names = [n for n in self.evaluations if n not in ('step', 'time', 'data_time', 'memory')]
        names.sort(key=lambda name: not is_main(name))
        return {name: self.evaluations[name] for name in names}


def mean_and_deviation(
    points: Iterable[tuple[int, float]],
) -> tuple[list[int], list[float], list[float]]:
    """Return the steps of points, with mean and standard deviation of the values at each step."""
    by_step: dict[int, list[float]] = {}
    for step, value in points:
        by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    values = [by_step[step] for step in steps]
    return steps, [*map(fmean, values)], [stdev(v) if len(v) > 1 else 0.0 for v in values]


def read_log(run: str | os.PathLike) -> Log:
    """Read the scalars that mmengine logged in a run.

    Evaluations that were logged by epoch are placed at the last training step before them.

    Args:
        run: a work dir, whose runs are joined, each from its first step on; or a scalars.json
            file.

    Raises:
        FileNotFoundError: if no log exists.
        ValueError: if a line is not one of a log; the message names it.
    """
    path = Path(run)
    logs = sorted(path.glob('*/vis_data/scalars.json')) if path.is_dir() else [path]
    if not logs:
        raise UserFileNotFoundError(
            f'{run} holds no */vis_data/scalars.json; name the work dir of a training'
        )
    lines: list[dict] = []
    for log in logs:
        new = list(_read_lines(log))
        # A resumed run repeats the steps behind its checkpoint.
        first = next((line['step'] for line in new if _is_training(line)), math.inf)
        lines = [line for line in lines if line['step'] < first]
        reached = lines[-1]['step'] if lines else 0
        for line in new:
            # LoggerHook logs evaluations by epoch by default, and as step 0 in a loop of
            # iterations.
            reached = max(reached, line['step'])
            lines.append({**line, 'step': reached})
    result = Log()
    for line in lines:
        curves = result.training if _is_training(line) else result.evaluations
        for key, value in line.items():
            if key.startswith('compact/'):  # ContractHook's: single values, in the table already.
                continue
            steps, values = curves.setdefault(key, ([], []))
            steps.append(line['step'])
            values.append(value)
    return result


def _is_training(line: dict) -> bool:
    # A validation may log a loss too.
    return any(key.rpartition('.')[2] in ('lr', 'base_lr') for key in line)


def _read_lines(path: Path) -> Iterator[dict]:
    # Undecodable bytes must still give an error that names the line.
    for number, line in enumerate(path.read_text(errors='replace').splitlines(), 1):
        try:
            scalars = json.loads(line)
            int(scalars['step'])
        except (ValueError, KeyError, TypeError):
            raise UserValueError(
                f'{path}, line {number}, holds no scalars with a step; name a work dir, or '
                'a scalars.json of its vis_data'
            ) from None
        yield scalars
