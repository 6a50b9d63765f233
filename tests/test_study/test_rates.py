"""The search of learning rates, on faked runs."""

import math

import pytest

from mmexpand.study import load_study, run_study, schedule
from mmexpand.study.rates import REACH, best_lr, rates_to_try, tried_rates
from mmexpand.study.results import load_result
from mmexpand.study.run import write_json
from mmexpand.study.statistics import summarise

AUTO = "del lrs\njobs = 1\nseeds = [0]\narms.pop('cl')\n"


@pytest.fixture
def runs(monkeypatch, put):
    """Runs whose score is a function of the rate; the rates of the tuning runs, in order."""
    made = []

    def fake(score):
        def run(study, run, *_):
            made.append(run.lr)
            value = score(run.lr)
            if isinstance(value, str):
                put(study, run.arm.name, run.lr, run.seed, status=value, reason='x')
            else:
                put(study, run.arm.name, run.lr, run.seed, val=value)
            return load_result(study, run)

        monkeypatch.setattr(schedule, '_run', run)
        return made

    return fake


def peak(at):
    return lambda lr: 50 - abs(math.log2(lr / at))


@pytest.mark.parametrize(
    ('at', 'tried'),
    [
        (1.0, [0.5, 1, 2]),
        (4.0, [0.5, 1, 2, 4, 8]),
        (0.25, [0.125, 0.25, 0.5, 1, 2]),
    ],
)
def test_the_best_has_a_worse_rate_on_both_sides(write_study, runs, at, tried):
    """The rate of the config is 1."""
    study = write_study(AUTO)
    made = runs(peak(at))
    run_study(study)
    arm = study.arm('compact')
    assert made[0] == 1
    assert sorted(made) == list(tried_rates(study, arm)) == tried
    assert best_lr(study, arm) == at
    assert not summarise(study, arm).problems
    made.clear()
    run_study(load_study('small.py'))
    assert made == []


@pytest.mark.parametrize('status', ['diverged', 'failed'])
def test_a_rate_that_diverged_is_worse_and_one_that_failed_is_not(write_study, runs, status):
    study = write_study(AUTO)
    made = runs(lambda lr: status if lr > 1 else 50 + lr)
    run_study(study)
    arm = summarise(study, study.arm('compact'))
    assert sorted(made) == [0.5, 1, 2]
    assert arm.lr == 1
    assert arm.edge is (status == 'failed')
    run_study(study)
    assert made[3:] == ([2] if status == 'failed' else [])


def test_from_a_rate_at_which_all_diverge(write_study, runs):
    study = write_study(AUTO)
    made = runs(lambda lr: 'diverged' if lr > 0.2 else 50 + lr)
    run_study(study)
    assert made == [1, 0.5, 0.25, 0.125, 0.0625]
    assert summarise(study, study.arm('compact')).lr == 0.125


@pytest.mark.parametrize(
    ('score', 'count'),
    [(lambda lr: 10, 3), (lambda lr: min(lr, 4), 6), (lambda lr: -max(lr, 0.25), 6)],
)
def test_a_plateau_ends_it(write_study, runs, score, count):
    study = write_study(AUTO)
    made = runs(score)
    run_study(study)
    assert len(made) <= count
    assert not summarise(study, study.arm('compact')).edge


@pytest.mark.parametrize('score', [lambda lr: lr, lambda lr: 1 / lr, lambda lr: 'diverged'])
def test_it_ends_where_no_rate_is_worse(write_study, runs, score):
    study = write_study(AUTO)
    made = runs(score)
    run_study(study)
    assert max(made + [1 / lr for lr in made]) == REACH
    assert len(made) <= 12


def test_it_goes_on_with_an_earlier_grid(write_study, runs, put):
    """A neighbour further than a factor of 2 is none; results at other rates are used."""
    study = write_study(AUTO)
    for lr in (0.3, 1.0, 3.0):
        put(study, 'compact', lr, 0, val=peak(1.4)(lr))
    made = runs(peak(1.4))
    run_study(study)
    assert made == [0.5, 2]
    assert tried_rates(study, study.arm('compact')) == (0.3, 0.5, 1, 2, 3)


def test_all_seeds_for_tuning_are_run_at_each_rate(write_study, runs, put):
    study = write_study(AUTO + 'tune_seeds = [0, 1]\n')
    put(study, 'compact', 1.0, 1, val=50)
    made = runs(peak(1.0))
    run_study(study)
    assert made == [1, 0.5, 2, 0.5, 2]


def test_each_arm_has_its_own_search_and_a_fixed_rate_has_none(write_study, runs, put):
    study = write_study(
        'del lrs\njobs = 1\nseeds = [0]\n'
        "arms['cl']['cfg_options']['optim_wrapper.optimizer.lr'] = 0.25\n"
        "arms['fixed'] = dict(config='net.py', lr=7)\n"
    )
    runs(peak(1.0))
    run_study(study)
    assert tried_rates(study, study.arm('compact')) == (0.5, 1, 2)
    assert tried_rates(study, study.arm('cl')) == (0.125, 0.25, 0.5, 1, 2)
    fixed = summarise(study, study.arm('fixed'))
    assert (fixed.lr, fixed.edge, len(fixed.scores)) == (7, False, 1)


def test_it_goes_on_after_the_time_was_up(write_study, runs, monkeypatch):
    study = write_study(AUTO)
    made = runs(peak(4.0))
    run_study(study, minutes=0)
    assert made == []
    now = iter(range(0, 60000, 60))
    monkeypatch.setattr(schedule.time, 'monotonic', lambda: next(now))
    run_study(study, minutes=8)
    first = len(made)
    assert 0 < first < 5
    assert summarise(study, study.arm('compact')).edge
    run_study(study)
    assert sorted(made) == [0.5, 1, 2, 4, 8]


def test_from_a_rate_that_is_too_low_for_any_metric(write_study, put, monkeypatch):
    """mmdet's evaluators give no metric without a detection."""
    study = write_study(AUTO)

    made = []

    def run(study, run, *_):
        made.append(run.lr)
        put(study, run.arm.name, run.lr, run.seed, val=50 - run.lr)
        if run.lr < 3:
            result = load_result(study, run) | dict(val={}, test={})
            write_json(result, study.result_path(run))
        return load_result(study, run)

    monkeypatch.setattr(schedule, '_run', run)
    run_study(study)
    assert made[:3] == [1, 2, 4]
    assert best_lr(study, study.arm('compact')) == 4


def test_a_metric_that_no_rate_gives_ends_the_search(write_study, runs):
    made = runs(peak(1.0))
    run_study(write_study(AUTO + "metric = 'acuracy'\n"))
    assert made == [1]


def test_one_diverged_seed_does_not_end_the_search(write_study, put):
    study = write_study(AUTO + 'seeds = tune_seeds = [0, 1]\n')
    put(study, 'compact', 1.0, 0)
    put(study, 'compact', 1.0, 1, status='diverged', reason='x')
    assert rates_to_try(study, study.arm('compact'), 1.0) == [0.5]
