"""Choice of the learning rate, paired differences, and their words."""

import math

import pytest
from scipy.stats import ttest_rel

from mmexpand.study.rates import best_lr, final_runs
from mmexpand.study.statistics import decimals, difference, in_words, summarise

GRID = 'lrs = [0.01, 0.1, 1.0]\n'
"""On which 0.1 is at no edge."""


def fill(study, put, compact, cl):
    """Test scores by seed, of both arms at 0.1."""
    for arm, scores in (('compact', compact), ('cl', cl)):
        put(study, arm, 0.01, 0, val=10.0)
        put(study, arm, 0.1, 0, val=20.0)
        if 1.0 in study.lrs:
            put(study, arm, 1.0, 0, val=10.0)
        for seed, score in enumerate(scores):
            put(study, arm, 0.1, seed, val=20.0, test=score)


def compare(study):
    cl, compact = (summarise(study, study.arm(name)) for name in ('cl', 'compact'))
    return cl, difference(cl, compact), compact


def test_interval_is_scipys_of_the_paired_test(write_study, put):
    study = write_study('seeds = [0, 1, 2, 3]\n')
    compact, cl = [70.0, 72.0, 71.0, 69.0], [72.5, 72.5, 73.0, 68.0]
    fill(study, put, compact, cl)
    arm, found, _ = compare(study)
    expected = ttest_rel(cl, compact).confidence_interval(0.95)
    assert found.values == {0: 2.5, 1: 0.5, 2: 2.0, 3: -1.0}
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.mean == pytest.approx(1.0)
    assert found.wins == 3
    assert arm.mean == pytest.approx(71.5)
    assert arm.deviation == pytest.approx(2.345208)


def test_only_common_seeds_are_compared(write_study, put):
    study = write_study('seeds = [0, 1, 2]\n')
    fill(study, put, [70.0], [71.0, 90.0, 80.0])
    arm, found, compact = compare(study)
    assert found.values == {0: 1.0}
    assert math.isnan(found.low)
    assert in_words(arm, found, compact) == ('cl: +1.00 against compact, one seed, no interval.')


@pytest.mark.parametrize(
    ('cl', 'said'),
    [
        (
            [72.0, 73.1, 73.9],
            'cl is above compact by 2.00 (95 % interval +1.75 to +2.25, 3 seeds).',
        ),
        (
            [68.0, 69.1, 69.9],
            'cl is below compact by 2.00 (95 % interval -2.25 to -1.75, 3 seeds).',
        ),
        ([71.0, 70.0, 72.0], 'cl: no difference from compact larger than 2.48 was seen'),
        ([70.0, 71.0, 72.0], 'cl: no difference from compact larger than 0.00 was seen'),
    ],
)
def test_sentences(write_study, put, cl, said):
    study = write_study(GRID + 'seeds = [0, 1, 2]\n')
    fill(study, put, [70.0, 71.0, 72.0], cl)
    assert in_words(*compare(study)).startswith(said)


def test_shares_get_more_decimals(write_study, put):
    assert decimals([0.51, 0.52]) == 4
    assert decimals([51.0, 0.5]) == 2
    study = write_study(GRID + 'seeds = [0, 1, 2]\n')
    fill(study, put, [0.51, 0.52, 0.53], [0.512, 0.5221, 0.5319])
    assert in_words(*compare(study), 4) == (
        'cl is above compact by 0.0020 (95 % interval +0.0018 to +0.0022, 3 seeds).'
    )


def test_best_rate_is_the_best_mean_on_validation(write_study, put):
    study = write_study('lrs = [0.01, 0.1, 1.0]\ntune_seeds = [0, 1]\n')
    arm = study.arm('cl')
    assert best_lr(study, arm) is None
    assert final_runs(study, arm) == []
    for lr, values in ((0.01, (90, 10)), (0.1, (60, 62)), (1.0, (20, 30))):
        for seed, val in enumerate(values):
            # The test split would choose another.
            put(study, 'cl', lr, seed, val=val, test=100 * lr)
    assert best_lr(study, arm) == 0.1
    assert [run.name for run in final_runs(study, arm)] == ['lr0.1_seed0', 'lr0.1_seed1']
    assert not summarise(study, arm).problems


def test_a_rate_that_diverged_is_out(write_study, put):
    study = write_study('lrs = [0.01, 0.1, 1.0]\nseeds = [0]\n')
    put(study, 'cl', 0.01, 0, val=30)
    put(study, 'cl', 0.1, 0, val=40)
    put(study, 'cl', 1.0, 0, status='diverged', reason='the loss is nan')
    arm = summarise(study, study.arm('cl'))
    assert arm.lr == 0.1
    # A rate above 0.1 was tried: 0.1 is at no edge.
    assert not arm.edge
    assert arm.problems == ('cl, lr 1, seed 0: diverged: the loss is nan',)


def test_nothing_is_a_gain_over_a_baseline_at_the_edge(study, put, write_study):
    fill(study, put, [70.0, 71.0], [72.0, 73.1])
    cl, found, compact = compare(study)
    assert compact.edge and found.low > 0
    assert in_words(cl, found, compact) == (
        'cl: +2.05 against compact (95 % interval +1.41 to +2.69, 2 seeds); no gain, as long as '
        'the best learning rate of compact, 0.1, is at the edge of those tried: try more.'
    )
    assert compact.problems == (
        'compact: its best learning rate, 0.1, is at the edge of those tried',
    )
    # With one more rate, which is worse, it is one.
    study = write_study(GRID)
    put(study, 'compact', 1.0, 0, val=10.0)
    cl, found, compact = compare(study)
    assert cl.edge and not compact.edge
    assert in_words(cl, found, compact).startswith('cl is above compact by 2.05 (')


def test_a_grid_half_tried_has_edges_too(write_study, put):
    study = write_study(GRID)
    for lr, val in ((0.01, 10.0), (0.1, 20.0)):
        put(study, 'cl', lr, 0, val=val)
    assert summarise(study, study.arm('cl')).edge


def test_a_grid_half_done_is_said(study, put):
    put(study, 'cl', 0.1, 0)
    problems = summarise(study, study.arm('cl')).problems
    assert 'cl: not tuned yet at learning rates 0.01' in problems


def test_rates_that_are_chosen_by_what_is_reported_are_said(write_study, put):
    study = write_study("arms['cl'].update(lr=0.1)\n")
    for arm in ('compact', 'cl'):
        put(study, arm, 0.1, 0, test_is_val=True)
    said = 'compact: its learning rate is chosen by the images that it is reported on'
    tuned, fixed = (summarise(study, study.arm(name)).problems for name in ('compact', 'cl'))
    assert any(problem.startswith(said) for problem in tuned)
    assert not any('chosen by' in problem for problem in fixed)


def test_fixed_rates_and_own_seeds(write_study, put):
    study = write_study("arms['cl'].update(lr=0.5, seeds=[3])\n")
    put(study, 'cl', 0.5, 3, test=61)
    arm = summarise(study, study.arm('cl'))
    assert (arm.lr, arm.scores, arm.problems) == (0.5, {3: 61}, ())
