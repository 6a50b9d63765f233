"""Which runs a study needs, and running those that have no result yet."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from statistics import fmean

from mmengine.logging import print_log

from .run import write_json
from .spec import Arm, Run, Study


def load_result(study: Study, run: Run) -> dict | None:
    """The result of a run; None where there is none, or one that is worth another try."""
    try:
        result = json.loads(study.result_path(run).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return result


def score(study: Study, result: dict | None, split: str) -> float | None:
    """The metric of a result; None where it has none."""
    return ((result or {}).get(split) or {}).get(study.metric)


def tuning_runs(study: Study, arm: Arm) -> list[Run]:
    """The runs that an arm's learning rate is chosen by; none where it is fixed."""
    if arm.lr is not None:
        return []
    return [Run(arm, lr, seed) for seed in study.tune_seeds for lr in study.lrs]


def best_lr(study: Study, arm: Arm) -> float | None:
    """The rate with the best mean on the validation split; None as long as none has finished.

    A rate at which a run diverged is out.
    """
    if arm.lr is not None:
        return float(arm.lr)
    scores = {}
    for lr in study.lrs:
        results = [load_result(study, Run(arm, lr, seed)) for seed in study.tune_seeds]
        values = [score(study, result, 'val') for result in results]
        if all(value is not None for value in values):
            scores[lr] = fmean(values)
    return max(scores, key=scores.get) if scores else None


def final_runs(study: Study, arm: Arm, seeds: Sequence[int] | None = None) -> list[Run]:
    """The runs that are reported: all seeds at the arm's best rate."""
    lr = best_lr(study, arm)
    chosen = study.seeds if arm.seeds is None else arm.seeds
    return [] if lr is None else [Run(arm, lr, s) for s in chosen if not seeds or s in seeds]


def run_study(
    study: Study, arms: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> None:
    """Run what has no result: first all learning rates, then all seeds at the best ones.

    Args:
        study: the study.
        arms: names of the arms to run; None: all.
        seeds: those of the final runs to run; None: all.

    Raises:
        StudyError: for an arm that there is not.
    """
    chosen = [study.arm(name) for name in arms or study.arms]
    _run_all(study, [run for arm in chosen for run in tuning_runs(study, arm)], 'learning rates')
    finals = [final_runs(study, arm, seeds) for arm in chosen]
    # Seed by seed, so that all arms can be compared before the last one has all of its own.
    by_seed = sorted((run for runs in finals for run in runs), key=lambda run: run.seed)
    _run_all(study, by_seed, 'seeds')


def _run_all(study: Study, runs: Iterable[Run], what: str) -> None:
    wanted = []
    for run in runs:
        result = load_result(study, run)
        if result is None or result['status'] == 'failed':
            wanted.append(run)
    if not wanted:
        return
    _log(f'{study.name}, {what}: {len(wanted)} runs to do, {study.jobs} at a time')
    started = time.monotonic()
    with ThreadPoolExecutor(study.jobs) as pool:
        futures = {pool.submit(_run, study, run): run for run in wanted}
        for done, future in enumerate(as_completed(futures), 1):
            left = (time.monotonic() - started) / done * (len(wanted) - done)
            run, result = futures[future], future.result()
            value = score(study, result, 'val')
            said = f'{study.metric} {value:.2f} (val)' if value is not None else _why(study, result)
            _log(f'{done}/{len(wanted)} {run}: {said}; {left / 60:.0f} min left')


def _run(study: Study, run: Run) -> dict:
    folder = study.work_dir / run.arm.name / run.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, '-m', 'mmexpand.study.run', str(study.path), run.arm.name]
    command += [repr(run.lr), str(run.seed)]
    threads = str(study.threads)
    env = {**os.environ, 'OMP_NUM_THREADS': threads, 'MKL_NUM_THREADS': threads}
    with open(folder / 'output.txt', 'w') as output:
        done = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env=env, check=False
        )
    if done.returncode:
        base = dict(study=study.name, arm=run.arm.name, lr=run.lr, seed=run.seed)
        reason = f'its process ended with status {done.returncode}; see {folder / "output.txt"}'
        write_json(dict(base, status='failed', reason=reason), study.result_path(run))
    return load_result(study, run)


def _why(study: Study, result: dict) -> str:
    if result['status'] != 'ok':
        return f'{result["status"]}: {result["reason"]}'
    return f'no {study.metric!r}; the evaluator gave {", ".join(result["val"])}'


def _log(message: str) -> None:
    print_log(message, logger='current', level=logging.INFO)
