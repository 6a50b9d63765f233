"""Where the points of a log stand."""

import json

import pytest

from mmexpand.report.curves import Log, read_log
from mmexpand.report.run import RunReport, WeightSet


def write_log(work_dir, start, lines):
    folder = work_dir / start / 'vis_data'
    folder.mkdir(parents=True)
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (folder / 'scalars.json').write_text(text)
    return folder / 'scalars.json'


def train(step, loss):
    return dict(lr=0.1, loss=loss, loss_cls=loss / 2, time=0.5, step=step)


def evaluated(step, value):
    return dict(aAcc=80.0, mIoU=value, time=0.1, step=step)


@pytest.mark.parametrize(
    ('steps', 'counted'),
    [((0, 0), 'no epochs, in a loop of iterations'), ((1, 2), 'epochs'), ((20, 40), 'iterations')],
)
def test_evaluations_stand_where_training_was(tmp_path, steps, counted):
    lines = [train(10, 3.0), train(20, 2.0), evaluated(steps[0], 40.0)]
    lines += [train(30, 1.5), train(40, 1.0), evaluated(steps[1], 50.0)]
    log = read_log(write_log(tmp_path, '2024', lines))
    assert log.metrics['mIoU'] == ([20, 40], [40.0, 50.0]), counted
    assert log.training['loss'] == ([10, 20, 30, 40], [3.0, 2.0, 1.5, 1.0])
    assert list(log.losses) == ['loss', 'loss_cls']
    assert list(log.metrics) == ['mIoU', 'aAcc']


def test_metrics_of_contracted_networks_are_no_curve(tmp_path):
    lines = [train(10, 3.0), evaluated(10, 40.0), {'compact/last/mIoU': 41.0, 'step': 10}]
    assert list(read_log(write_log(tmp_path, '2024', lines)).metrics) == ['mIoU', 'aAcc']


def test_an_evaluation_between_two_logged_steps_keeps_its_own(tmp_path):
    lines = [train(10, 3.0), evaluated(15, 40.0), train(20, 2.0)]
    assert read_log(write_log(tmp_path, '2024', lines)).metrics['mIoU'] == ([15], [40.0])


def test_a_resumed_run_goes_on_where_it_set_in(tmp_path):
    write_log(tmp_path, '2024_1', [train(step, 10.0) for step in (10, 20, 30)])
    write_log(tmp_path, '2024_2', [train(step, 5.0) for step in (30, 40)])
    assert read_log(tmp_path).training['loss'] == ([10, 20, 30, 40], [10.0, 10.0, 5.0, 5.0])


def test_a_resumed_run_that_starts_with_a_validation_keeps_the_curves(tmp_path):
    write_log(tmp_path, '2024_1', [train(step, 10.0) for step in (10, 20, 30)])
    write_log(tmp_path, '2024_2', [evaluated(0, 40.0), train(30, 5.0)])
    log = read_log(tmp_path)
    assert log.training['loss'] == ([10, 20, 30], [10.0, 10.0, 5.0])
    assert log.metrics['mIoU'] == ([20], [40.0])


def test_a_run_resumed_after_its_end_keeps_the_curves(tmp_path):
    write_log(tmp_path, '2024_1', [train(10, 9.0), evaluated(0, 40.0)])
    write_log(tmp_path, '2024_2', [{'compact/last/mIoU': 41.0, 'step': 10}])
    log = read_log(tmp_path)
    assert log.training['loss'] == ([10], [9.0])
    assert log.metrics['mIoU'] == ([10], [40.0])


def test_a_run_anew_replaces_the_one_before(tmp_path):
    write_log(tmp_path, '2024_1', [train(10, 9.0), train(20, 8.0), evaluated(0, 40.0)])
    write_log(tmp_path, '2024_2', [train(10, 5.0)])
    log = read_log(tmp_path)
    assert log.training['loss'] == ([10], [5.0])
    assert log.metrics == {}


def test_long_curves_are_drawn_by_their_means(tmp_path):
    pytest.importorskip('plotly')
    from mmexpand.report.charts import POINTS, loss_chart

    steps = list(range(10, 25_010, 10))
    log = Log(dict(loss=(steps, [step % 20 / 10 for step in steps])))
    (line,) = loss_chart(log).data
    assert len(line.x) <= POINTS
    assert (line.x[0], line.x[-1]) == (30, 25_000)
    assert line.y[:2] == pytest.approx([2 / 3, 1 / 3])
    short = Log(dict(loss=([10, 20], [2.0, 1.0])))
    assert list(loss_chart(short).data[0].y) == [2.0, 1.0]


def test_a_validation_with_a_loss_is_an_evaluation(tmp_path):
    lines = [train(10, 3.0), dict(evaluated(10, 40.0), val_loss=2.5)]
    log = read_log(write_log(tmp_path, '2024', lines))
    assert log.metrics['mIoU'] == ([10], [40.0])
    assert 'val_loss' not in log.training


@pytest.mark.parametrize(
    ('names', 'chosen'),
    [
        (['best', 'ema', 'last'], 'best'),
        (['best_b', 'best_a', 'last'], 'best_a'),
        (['ema', 'last'], 'last'),
        (['epoch_3', 'last'], 'last'),
        (['epoch_3'], 'epoch_3'),
        ([], None),
    ],
)
def test_the_best_weights_are_shown_or_else_the_last(names, chosen):
    sets = [WeightSet(name, f'compact_{name}.pth', 1.0, 1e-3, {}) for name in names]
    found = RunReport('run', [], [], sets=sets).chosen
    assert (found.name if found else None) == chosen
