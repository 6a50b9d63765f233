"""Result files of a study's runs."""

import json
from pathlib import Path

from .spec import Run, Study


def load_result(study: Study, run: Run) -> dict | None:
    """Return the result of a run; None if no readable file exists."""
    return read_result(study.result_path(run))


def read_result(path: Path) -> dict | None:
    """Return the content of a result file; None if no readable file exists."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def score(study: Study, result: dict | None, split: str) -> float | None:
    """Return the metric of a result; None if it has none."""
    return ((result or {}).get(split) or {}).get(study.metric)


def is_final(result: dict | None) -> bool:
    """Return whether a run ended or diverged, and is not tried again."""
    return result is not None and result['status'] != 'failed'


def result_problem(study: Study, result: dict, split: str) -> str | None:
    """Return the reason why a result has no metric; None if it has one."""
    if score(study, result, split) is not None:
        return None
    if result['status'] == 'ok':
        given = ', '.join(result[split]) or 'nothing finite'
        return f'no {study.metric!r} on {split}; the evaluator gave {given}'
    return f'{result["status"]}: {result["reason"]}'
