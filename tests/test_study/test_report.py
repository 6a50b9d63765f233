"""A report from result files alone, whatever is missing in them."""

import json
from pathlib import Path

import pytest

from mmexpand import stack
from mmexpand.study import load_study, write_report
from tests.tools_in_process import run

GRID = 'lrs = [0.01, 0.1, 1.0]\n'


@pytest.fixture
def full(write_study, put):
    study = write_study(GRID)
    for arm, gain in (('compact', 0.0), ('cl', 1.5)):
        put(study, arm, 0.01, 0, val=10.0)
        put(study, arm, 1.0, 0, val=10.0)
        for seed in (0, 1):
            score = 70 + 3 * seed + gain * (1 + seed / 10)
            put(study, arm, 0.1, seed, val=60.0, test=score, seconds=10 * (1 + gain))
    return study


def test_report(full, tmp_path):
    text = write_report(full, tmp_path / 'out')
    assert '| compact | 0.1 | 2 | 71.50 | 2.12 |  |  |  | 1.00 | 60.00 |' in text
    row = '| cl | 0.1 | 2 | 73.08 | 2.23 | +1.58 | +0.62 to +2.53 | 2 of 2 | 2.50 | 60.00 |'
    assert row in text
    assert '- cl is above compact by 1.58 (95 % interval +0.62 to +2.53, 2 seeds).' in text
    out = tmp_path / 'out'
    names = ['curves.png', 'differences.png', 'study.html', 'study.json', 'study.md']
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / 'study.md').read_text() == text
    whole = json.loads((out / 'study.json').read_text())
    assert (whole['metric'], whole['baseline']) == ('accuracy', 'compact')
    assert whole['arms']['cl']['differences'] == pytest.approx({'0': 1.5, '1': 1.65})
    assert whole['arms']['cl']['interval'] == pytest.approx([0.622035, 2.527965], abs=1e-5)
    assert whole['arms']['compact']['interval'] is None


def test_the_page_says_the_same(full, put, tmp_path):
    put(full, 'cl', 0.1, 1, reason='it broke', status='failed', val={}, test={})
    text = write_report(full, tmp_path)
    html = (tmp_path / 'study.html').read_text()
    (row,) = (line for line in text.splitlines() if line.startswith('| cl |'))
    cells = [f'<td class="n">{cell.strip()}</td>' for cell in row.split('|')[2:-1]]
    assert f'<td>cl</td>{"".join(cells)}' in html
    said = [line[2:] for line in text.splitlines() if line.startswith('- ')]
    assert len(said) == 2
    assert all(f'<li>{line}</li>' in html for line in said)


def test_without_what_draws_pages_the_rest_is_written(full, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stack, 'find_spec', lambda name: None)
    path = Path('small.py').absolute()
    assert run('study.py', path, '--report-only', '--out-dir', tmp_path / 'out') == (0, '')
    output = capsys.readouterr()
    assert output.err.startswith('study: study.html will not be written: a report requires jinja2')
    names = {path.name for path in (tmp_path / 'out').iterdir()}
    assert names == {'curves.png', 'differences.png', 'study.json', 'study.md'}


def test_arms_may_be_called_anything(full, write_study, put, tmp_path):
    study = write_study("arms['study'] = dict(config='net.py', lr=0.1)\n")
    put(study, 'study', 0.1, 0)
    write_report(study, tmp_path / 'out')
    whole = json.loads((tmp_path / 'out/study.json').read_text())
    assert whole['study'] == 'small'
    assert whole['arms']['study']['mean'] == 50


def test_an_edge_is_marked(study, put, tmp_path):
    for seed in (0, 1):
        put(study, 'compact', 0.1, seed, val=20, test=70 + seed)
        put(study, 'cl', 0.1, seed, val=20, test=72.0 + seed)
    text = write_report(study, tmp_path / 'out')
    assert '| compact | 0.1 (edge) | 2 |' in text
    assert '; no gain, as long as the best learning rate of compact, 0.1, is at the edge' in text
    assert json.loads((tmp_path / 'out/study.json').read_text())['arms']['compact']['edge'] is True


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (
            dict(status='failed', reason='it broke', test={}),
            'cl, lr 0.1, seed 1: failed: it broke.',
        ),
        (
            dict(test=dict(mIoU=3.0, aAcc=4.0)),
            "cl, lr 0.1, seed 1: no 'accuracy' on test; the evaluator gave mIoU, aAcc.",
        ),
        (None, 'cl: seeds 1 have not been run.'),
    ],
)
def test_a_run_that_gives_nothing_is_said_and_the_rest_reported(full, put, tmp_path, change, said):
    path = full.results_dir / 'cl' / 'lr0.1_seed1.json'
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(val={}) | change))
    text = write_report(full, tmp_path / 'out')
    assert f'- {said}' in text
    assert '| compact | 0.1 | 2 |' in text
    assert '| cl | 0.1 | 1 | 71.50 |' in text


def test_no_time_is_given_where_the_machine_was_not_equally_free(full, put, tmp_path):
    put(full, 'cl', 0.1, 1, val=70, seconds=50.0)
    text = write_report(full, tmp_path / 'out')
    assert ' | 1 of 2 |  |' in text and ' | 1.00 |' in text
    assert '- cl: its trainings took 25 to 50 s, since the load of the machine changed' in text


@pytest.mark.parametrize('period', [[200, 210], None])
def test_no_time_is_given_of_an_arm_trained_at_another_time(full, put, tmp_path, period):
    for seed in (0, 1):
        put(full, 'cl', 0.1, seed, val=70, period=period)
    text = write_report(full, tmp_path / 'out')
    assert ' | 0 of 2 |  |' in text and ' | 1.00 |' in text
    assert '- No training time is given of arms that were not trained at the same time' in text
    assert 'compact: cl; tools/analysis_tools/benchmark_training.py' in text


def test_a_validation_that_gave_nothing_is_left_out_of_the_curves(full, put, tmp_path):
    """mmdet's evaluator gives nothing as long as nothing is detected."""
    put(full, 'cl', 0.1, 1, val=70, curve=[[2, None], [4, 70]])
    text = write_report(full, tmp_path / 'out')
    assert '| cl | 0.1 | 2 |' in text
    assert (tmp_path / 'out/study.html').stat().st_size > 10_000


def test_another_metric_shows_what_the_evaluator_gave(full, write_study, tmp_path):
    text = write_report(write_study("metric = 'mIoU'\n"), tmp_path / 'out')
    assert "- cl, lr 0.1, seed 0: no 'mIoU' on val; the evaluator gave accuracy." in text
    assert '- No seed has been run to its end: compact, cl.' in text


def test_without_any_result(study, tmp_path):
    text = write_report(study, tmp_path / 'out')
    assert text.endswith('- No seed has been run to its end: compact, cl.\n')


def test_an_arm_without_a_config(full, write_study, tmp_path):
    write_study(GRID + "arms['other'] = dict(config='gone.py')\n")
    text = write_report(load_study('small.py'), tmp_path / 'out')
    assert '- No seed has been run to its end: other.' in text
    assert '- cl is above compact' in text


def test_results_of_a_changed_config_are_named(full, tmp_path):
    for seed, config in ((0, 'a1'), (1, 'b2')):
        path = full.results_dir / 'cl' / f'lr0.1_seed{seed}.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(config=config)))
    text = write_report(full, tmp_path)
    assert '- cl: its config was changed between lr0.1_seed0 and lr0.1_seed1: remove' in text
    assert 'compact: its config' not in text
