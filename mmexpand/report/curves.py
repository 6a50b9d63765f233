"""The scalars that mmengine logged while it trained."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserFileNotFoundError, UserValueError

Curve = tuple[list[int], list[float]]
"""Steps, in iterations, and values."""


@dataclass
class Log:
    """What was logged in a run, by name.

    Attributes:
        training: losses, learning rates, times.
        evaluations: what the evaluators gave.
    """

    training: dict[str, Curve] = field(default_factory=dict)
    evaluations: dict[str, Curve] = field(default_factory=dict)

    @property
    def losses(self) -> dict[str, Curve]:
        """The total loss, then its parts."""
        names = [name for name in self.training if 'loss' in name]
        return {name: self.training[name] for name in sorted(names, key=lambda n: n != 'loss')}

    @property
    def metrics(self) -> dict[str, Curve]:
        """What the evaluators gave, the main metrics first."""
        names = [n for n in self.evaluations if n not in ('step', 'time', 'data_time', 'memory')]
        names.sort(key=lambda name: not is_main(name))
        return {name: self.evaluations[name] for name in names}


def is_main(metric: str) -> bool:
    """Whether it is what detectors and segmentors are compared by."""
    return metric.endswith(('mAP', 'mIoU'))


def read_log(run: str | os.PathLike) -> Log:
    """The scalars that mmengine logged in a run.

    Evaluations that were logged by epoch stand where training was by then.

    Args:
        run: work dir, of which all runs are taken, each from the step on where it set in; or a
            scalars.json file.

    Raises:
        FileNotFoundError: if there is no log.
        ValueError: naming a line that is none of a log.
    """
    path = Path(run)
    logs = sorted(path.glob('*/vis_data/scalars.json')) if path.is_dir() else [path]
    if not logs:
        raise UserFileNotFoundError(f'{run} holds no */vis_data/scalars.json: was it trained?')
    lines: list[dict] = []
    for log in logs:
        new = list(_read_lines(log))
        if new:
            lines = [line for line in lines if line['step'] < new[0]['step']] + new
    result = Log()
    for line in lines:
        trained = any(key == 'lr' or 'loss' in key for key in line)
        curves = result.training if trained else result.evaluations
        for key, value in line.items():
            if key.startswith('compact/'):  # ContractHook's: single values, in the table already.
                continue
            steps, values = curves.setdefault(key, ([], []))
            steps.append(line['step'])
            values.append(value)
    return result


def _read_lines(path: Path) -> Iterator[dict]:
    reached = 0
    # A byte that is no text must not keep it from being told where.
    for number, line in enumerate(path.read_text(errors='replace').splitlines(), 1):
        try:
            scalars = json.loads(line)
            # LoggerHook counts epochs at evaluations unless told not to, and has none to count
            # where the loop is one of iterations.
            reached = max(reached, scalars['step'])
        except (ValueError, KeyError, TypeError):
            raise UserValueError(
                f'{path}, line {number}, is no line of scalars with a step; give a work dir, or '
                'a scalars.json of its vis_data'
            ) from None
        yield {**scalars, 'step': reached}
