"""Schedule of the runs of a study that have no result yet."""

import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue

import torch

from ..mm.contraction import check_writable
from ..mm.logs import log
from .rates import final_runs, tuning_rounds, unfinished
from .results import is_final, load_result, read_result, result_problem, score
from .run import arm_problem, config_digest, result_head, write_json
from .spec import Arm, Run, Study, StudyError


def run_study(
    study: Study,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    minutes: float = math.inf,
) -> None:
    """Run all runs without a result: first the learning rates, then all seeds at the best ones.

    An arm that cannot run is logged and skipped. A diverged run is final; a failed one is tried
    again.

    Args:
        study: the study.
        arms: names of the arms to run; None: all.
        seeds: seeds of the final runs to run; None: all.
        minutes: no run starts later than this; the next call continues.

    Raises:
        StudyError: for an unknown arm or seed.
        PermissionError: if a folder cannot be written to.
    """
    chosen = [study.arm(name) for name in arms or study.arms]
    known = {seed for arm in chosen for seed in arm.seeds}
    if unknown := set(seeds or ()) - known:
        named = ', '.join(map(str, sorted(unknown)))
        raise StudyError(f'{study.path} has no seed {named}; it has {sorted(known)}')
    problems = {arm.name: arm_problem(arm) for arm in chosen}
    for problem in filter(None, problems.values()):
        log(problem, logging.WARNING)
    chosen = [arm for arm in chosen if problems[arm.name] is None]
    for arm in chosen:
        _warn_of_other_configs(study, arm)
    deadline = time.monotonic() + 60 * minutes
    for runs in tuning_rounds(study, chosen):
        _run_all(study, runs, 'learning rates', deadline, _finals_to_come(study, chosen, seeds))
    finals = [final_runs(study, arm, seeds) for arm in chosen]
    # Seed by seed, so that all arms can be compared before all seeds have finished.
    by_seed = sorted((run for runs in finals for run in runs), key=lambda run: run.seed)
    _run_all(study, by_seed, 'seeds', deadline)


def _warn_of_other_configs(study: Study, arm: Arm) -> None:
    """Log a warning if results of an arm are of a config that has changed since."""
    digest = config_digest(arm)
    for path in sorted((study.results_dir / arm.name).glob('lr*_seed*.json')):
        # Older results have none.
        if (read_result(path) or {}).get('config', digest) != digest:
            log(
                f'{path} was made with another config of {arm.name}; remove the file to run it '
                'again',
                logging.WARNING,
            )


def _finals_to_come(study: Study, arms: Sequence[Arm], seeds: Sequence[int] | None) -> int:
    """Return the number of runs that follow the tuning; a tuning run at the best rate is final."""
    number = 0
    for arm in arms:
        reported = set(arm.seeds) & set(seeds or arm.seeds)
        number += len(reported - set(study.tune_seeds if arm.lr is None else ()))
    return number


def _run_all(
    study: Study, runs: Iterable[Run], what: str, deadline: float, to_come: int = 0
) -> None:
    wanted = unfinished(study, runs)
    if not wanted:
        return
    check_writable(study.results_dir, fix=f'set results_dir of {study.path}')
    check_writable(study.work_dir, fix='run the command in another folder')
    log(f'{study.name}, {what}: {len(wanted)} runs to do, {study.jobs} at a time')
    started = time.monotonic()
    children = _Children()
    devices = _devices(study.jobs)
    pool = ThreadPoolExecutor(study.jobs)

    def start(run: Run) -> tuple[dict | None] | None:
        late = time.monotonic() >= deadline
        return None if late else (_run(study, run, children, devices),)

    try:
        futures = {pool.submit(start, run): run for run in wanted}
        done = 0
        for future in as_completed(futures):
            if (ended := future.result()) is None:
                continue
            done += 1
            left = (time.monotonic() - started) / done * (len(wanted) - done + to_come)
            said = _said(study, *ended)
            of_seeds = ', all seeds included' if to_come else ''
            log(
                f'{done}/{len(wanted)} {futures[future]}: {said}; {left / 60:.0f} min left'
                f'{of_seeds}'
            )
        if done < len(wanted):
            log(f'{len(wanted) - done} runs not started, the time is over; call the tool again')
    except BaseException:
        # Ctrl-C ends running processes and starts no other; the next call continues.
        children.end()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class _Children:
    """The processes of runs, which end with the study."""

    def __init__(self):
        self.ended = False
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()

    def run(self, command: list[str], **options: object) -> int | None:
        """Run a command and return its status; None if the study has ended."""
        with self._lock:
            if self.ended:
                return None
            process = subprocess.Popen(command, **options)
            self._running.add(process)
        status = process.wait()
        with self._lock:
            self._running.discard(process)
            return None if self.ended else status

    def end(self) -> None:
        """End all processes, and start no more."""
        with self._lock:
            self.ended = True
            for process in self._running:
                process.terminate()


def _devices(jobs: int) -> SimpleQueue[dict[str, str]]:
    """Return environment variables for each of several processes that share the GPUs."""
    visible = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')
    gpus = visible if visible != [''] else [str(i) for i in range(torch.cuda.device_count())]
    queue: SimpleQueue[dict[str, str]] = SimpleQueue()
    for job in range(jobs):
        queue.put(dict(CUDA_VISIBLE_DEVICES=gpus[job % len(gpus)]) if gpus else {})
    return queue


def _run(
    study: Study, run: Run, children: _Children, devices: SimpleQueue[dict[str, str]]
) -> dict | None:
    folder = study.work_dir / run.arm.name / run.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, '-m', 'mmexpand.study', str(study.path), run.arm.name]
    command += [repr(run.lr), str(run.seed)]
    threads = str(study.threads)
    device = devices.get()
    env = {**os.environ, 'OMP_NUM_THREADS': threads, 'MKL_NUM_THREADS': threads, **device}
    try:
        with open(folder / 'output.txt', 'a') as output:
            status = children.run(command, stdout=output, stderr=subprocess.STDOUT, env=env)
    finally:
        devices.put(device)  # Else the next job of this thread would wait for a device for ever.
    # A process may abort at its exit, after its result was written.
    if status and not is_final(load_result(study, run)):
        reason = f'its process ended with status {status}; see {folder / "output.txt"}'
        result = dict(result_head(study, run), status='failed', reason=reason)
        write_json(result, study.result_path(run))
    return load_result(study, run)


def _said(study: Study, result: dict | None) -> str:
    if result is None:
        return 'no result'
    problem = result_problem(study, result, 'val')
    return problem or f'{study.metric} {score(study, result, "val"):.4g} (val)'
