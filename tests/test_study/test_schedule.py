"""Which runs are made, in what order, and going on after a kill."""

import fcntl
import json
import runpy
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from mmexpand.study import Run, StudyError, load_study, run_study, schedule
from mmexpand.study.results import load_result
from mmexpand.study.run import config_digest, main
from mmexpand.study.schedule import _Children

TOOL = Path(__file__).parents[2] / 'tools/study.py'

KILLER = """
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class KillOnce(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        with open('steps.txt', 'a') as file:
            print(runner.iter, file=file)
        if runner.iter == 5 and not os.path.exists('killed'):
            open('killed', 'w').close()
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def runs(monkeypatch, put):
    """Writes results in the place of processes; the names of the runs, in order."""
    made, given = [], {}

    def run(study, run, *_):
        made.append(f'{run.arm.name} {run.name}')
        result = given.get(made[-1], dict(val=100 * run.lr))
        put(study, run.arm.name, run.lr, run.seed, **result)
        return schedule.load_result(study, run)

    monkeypatch.setattr(schedule, '_run', run)
    return made, given


def test_rates_first_then_seeds_and_nothing_twice(write_study, runs):
    study, (made, _) = write_study('jobs = 1\n'), runs
    run_study(study)
    tuning = [f'{arm} lr{lr}_seed0' for arm in ('compact', 'cl') for lr in (0.01, 0.1)]
    assert made == [*tuning, 'compact lr0.1_seed1', 'cl lr0.1_seed1']
    made.clear()
    run_study(study)
    assert made == []


def test_failed_runs_are_tried_again_diverged_ones_are_not(write_study, runs):
    study, (made, given) = write_study('jobs = 1\n'), runs
    given['cl lr0.1_seed0'] = dict(status='failed', reason='x')
    given['cl lr0.01_seed0'] = dict(status='diverged', reason='y')
    run_study(study)
    assert 'cl lr0.1_seed1' not in made
    made.clear()
    given.clear()
    run_study(study)
    assert made == ['cl lr0.1_seed0', 'cl lr0.1_seed1']


def test_a_part_can_be_chosen(write_study, runs):
    study, (made, _) = write_study('jobs = 1\n'), runs
    run_study(study, ['cl'], [1])
    assert made == ['cl lr0.01_seed0', 'cl lr0.1_seed0', 'cl lr0.1_seed1']


def test_what_there_is_not(write_study, runs):
    study = write_study()
    with pytest.raises(StudyError, match=r"no arm 'compakt'; near matches: compact"):
        run_study(study, ['compakt'])
    with pytest.raises(StudyError, match=r'no seed 7; it has \[0, 1\]'):
        run_study(study, seeds=[7])
    assert runs[0] == []


def test_an_arm_that_cannot_run_is_left_out(write_study, runs):
    study, (made, _) = write_study("arms['cl']['config'] = 'gone.py'\n"), runs
    run_study(study)
    assert {name.split()[0] for name in made} == {'compact'}


def test_processes_killed_and_resumed(write_study, tmp_path, monkeypatch):
    """Killed at iteration 5, resumed from the checkpoint of 4, with the points before it."""
    (tmp_path / 'killer.py').write_text(KILLER)
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path}:{TOOL.parents[1]}')
    monkeypatch.syspath_prepend(tmp_path)
    study = write_study(
        "arms['cl'].update(lr=0.1, seeds=[0])\n"
        "arms['cl']['cfg_options']['custom_hooks'].append(dict(type='KillOnce'))\n"
        "imports = dict(imports=['mmexpand', 'killer'], allow_failed_imports=False)\n"
        "arms['cl']['cfg_options']['custom_imports'] = imports\n"
    )
    path = tmp_path / 'results/cl/lr0.1_seed0.json'
    run_study(study, ['cl'])
    failed = json.loads(path.read_text())
    assert failed['status'] == 'failed'
    assert 'ended with status -9' in failed['reason']
    run_study(study, ['cl'])
    result = json.loads(path.read_text())
    assert result['status'] == 'ok'
    assert [step for step, _ in result['curve']] == [2, 4, 6, 8]
    assert [step for step, _ in result['loss']] == list(range(1, 9))
    steps = [int(line) for line in (tmp_path / 'steps.txt').read_text().split()]
    assert steps == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ('visible', 'count', 'given'),
    [(None, 0, [None] * 3), (None, 2, ['0', '1', '0']), ('5,3', 2, ['5', '3', '5'])],
)
def test_jobs_share_the_gpus(monkeypatch, visible, count, given):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    devices = schedule._devices(3)
    assert [devices.get().get('CUDA_VISIBLE_DEVICES') for _ in range(3)] == given


def test_processes_end_with_the_study():
    children, statuses = _Children(), []
    command = [sys.executable, '-c', 'import time; time.sleep(60)']
    thread = threading.Thread(target=lambda: statuses.append(children.run(command)))
    thread.start()
    while not children._running:
        time.sleep(0.01)
    children.end()
    thread.join(10)
    assert statuses == [None]
    assert children.run(command) is None


def test_no_run_is_started_after_the_time(write_study, runs, monkeypatch, capsys):
    study, (made, _) = write_study('jobs = 1\n'), runs
    now = iter(range(0, 6000, 60))
    monkeypatch.setattr(schedule.time, 'monotonic', lambda: next(now))
    run_study(study, minutes=3)
    assert 0 < len(made) < 4
    run_study(study)
    assert len(made) == len(set(made)) == 6


def test_tool(write_study, put, tmp_path, monkeypatch, capsys):
    study = write_study("arms['compact']['lr'] = 0.1\nseeds = [0]\n")
    put(study, 'compact', 0.1, 0, test=64)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['study.py', 'small.py', *arguments])
        runpy.run_path(str(TOOL), run_name='__main__')

    with pytest.raises(
        SystemExit, match=r"study.py: small.py has no arm 'cmpact'; near.*: compact"
    ):
        run('--arms', 'cmpact')
    run('--report-only')
    assert '| compact | 0.1 (fixed) | 1 | 64.00 |' in capsys.readouterr().out
    assert (tmp_path / 'work_dirs/small/study.json').is_file()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_time_left_includes_the_seeds_to_come(write_study, runs, monkeypatch):
    """Every run takes a minute: 4 of learning rates, then seed 1 of both arms."""
    study, lines = write_study('jobs = 1\n'), []
    clock = [0.0]
    run = schedule._run

    def a_minute(*arguments):
        clock[0] += 60
        return run(*arguments)

    monkeypatch.setattr(schedule, '_run', a_minute)
    monkeypatch.setattr(schedule.time, 'monotonic', lambda: clock[0])
    monkeypatch.setattr(schedule, 'log', lambda message, *_: lines.append(message))
    run_study(study)
    assert sum(' min left' in line for line in lines) == 6
    tuned = [line for line in lines if line.startswith('4/4')]
    assert [line.partition('; ')[2] for line in tuned] == ['2 min left, all seeds included']
    assert lines[-1].endswith('; 0 min left')


def test_results_of_another_config_are_named(write_study, put, runs, monkeypatch):
    said = []
    monkeypatch.setattr(schedule, 'log', lambda text, *_: said.append(text))
    study = write_study('jobs = 1\n')
    put(study, 'compact', 0.1, 0, config=config_digest(study.arm('compact')))
    run_study(study)
    assert not [text for text in said if 'another config' in text]
    net = Path('net.py')
    net.write_text(net.read_text().replace('max_iters=8', 'max_iters=16'))
    run_study(load_study('small.py'))
    assert 'compact/lr0.1_seed0.json was made with another config' in ' '.join(said)


def test_a_result_outlives_a_process_that_aborts_at_its_exit(write_study, put, monkeypatch):
    study = write_study()
    run = Run(study.arm('compact'), 0.1, 0)

    class Children:
        def run(self, *_, **__):
            put(study, 'compact', 0.1, 0, val=60)
            return -6

    devices = SimpleQueue()
    devices.put({})
    assert schedule._run(study, run, Children(), devices)['status'] == 'ok'


def test_an_unwritable_results_folder_is_refused_before_the_first_run(study):
    with pytest.raises(PermissionError, match='/proc/results'):
        run_study(replace(study, results_dir=Path('/proc/results')))


def test_a_run_waits_for_another_process_that_trains_it(study, put, monkeypatch):
    one = Run(study.arm('compact'), 0.1, 0)
    folder = study.work_dir / 'compact' / one.name
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys, 'argv', ['run', str(study.path), 'compact', '0.1', '0'])
    process = threading.Thread(target=main)
    with open(folder / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process.start()
        process.join(1)
        assert process.is_alive()
        put(study, 'compact', 0.1, 0, val=12.0)
    process.join(60)
    assert load_result(study, one)['val'] == dict(accuracy=12.0)
    assert list(folder.iterdir()) == [folder / 'lock']
