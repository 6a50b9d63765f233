"""The page that a training leaves behind."""

import os
import re
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner

pytest.importorskip('jinja2')
pytest.importorskip('plotly')

from mmexpand import stack
from mmexpand.mm import hooks, run_report
from mmexpand.mm.hooks import ContractHook
from mmexpand.surgery.checkpoint import load_checkpoint
from tests.tools_in_process import run

EXPAND = dict(type='ExpandHook', method='cl', include='backbone.encoder', rate=2)
CONTRACT = dict(type='ContractHook', report=True, evaluate_expanded=True)


@pytest.fixture
def trained(seg_cfg):
    cfg = seg_cfg(
        **{'custom_hooks': [EXPAND, CONTRACT], 'default_hooks.checkpoint.save_best': 'mIoU'}
    )
    Runner.from_cfg(cfg).train()
    return cfg


def test_the_hook_writes_a_page_that_needs_nothing_else(trained):
    work_dir = Path(trained.work_dir)
    html = (work_dir / 'report.html').read_text()
    assert not list(work_dir.glob('.*report*'))
    assert len(html) < 8e6
    own = re.sub(r'<script>.*?</script>', '', html, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!data:|#)', own)
    assert 'Not in this report' not in html
    found = load_checkpoint(work_dir / 'compact_best.pth')['meta']['mmexpand']
    for name in found['layers']:
        assert f'<code>{name}</code>' in html
    assert 'not included' in html
    assert '<code>decode_head.conv_seg</code>' in html
    assert f'<td class="n">{found["metrics_compact"]["mIoU"]:.2f}</td>' in html
    assert f'{found["output_error"]:.1e}' in html
    assert html.count('<figure ') == 4
    assert own.count('href="data:image/png') == 8


def test_errors_of_pictures_add_up_to_the_evaluators_accuracy(trained):
    work_dir = Path(trained.work_dir)
    html = (work_dir / 'report.html').read_text()
    shares = [1 - float(error) for error in re.findall(r'data-error="([^"]+)"', html)]
    assert len(shares) == 4
    # Every wrong pixel is a false one of one class and a missed one of another.
    accuracy = sum(200 * share / (1 + share) for share in shares) / 4
    found = load_checkpoint(work_dir / 'compact_best.pth')['meta']['mmexpand']
    assert 0 < accuracy < 100
    assert found['metrics_compact']['aAcc'] == pytest.approx(accuracy, abs=0.02)


def test_what_is_missing_is_said_and_the_rest_written(trained, street, tmp_path):
    trained.val_dataloader.dataset.data_root = str(tmp_path / 'moved')
    (log,) = Path(trained.work_dir).glob('*/vis_data/scalars.json')
    log.write_text('no log\n')
    path, notes = run_report.write_run_report(trained.work_dir, trained)
    html = path.read_text()
    assert [note.split(':')[0] for note in notes] == ['Curves', 'Predictions']
    assert 'holds no scalars' in notes[0]
    assert str(tmp_path / 'moved') in notes[1]
    assert 'Not in this report' in html
    assert '<figure ' not in html
    assert '<code>backbone.encoder.0.0.convs.0.conv</code>' in html


def test_a_foreign_checkpoint_is_named_and_skipped(trained):
    work_dir = Path(trained.work_dir)
    torch.save(dict(state_dict=dict(weight=torch.ones(2))), work_dir / 'compact_teacher.pth')
    path, notes = run_report.write_run_report(trained.work_dir, trained)
    assert notes == ['compact_teacher.pth: ContractHook has not written it.']
    assert path.read_text().count('<figure ') == 4


def test_networks_of_an_earlier_run_are_left_out(trained, capsys):
    work_dir = Path(trained.work_dir)
    best = load_checkpoint(work_dir / 'compact_best.pth')
    names = [
        load_checkpoint(work_dir / f'compact_{name}.pth')['meta']['experiment_name']
        for name in ('best', 'last')
    ]
    assert names[0] == names[1]
    best['meta']['experiment_name'] = 'an earlier one'
    torch.save(best, work_dir / 'compact_best.pth')
    os.utime(work_dir / 'compact_best.pth', (0, 0))
    del best['meta']['experiment_name']
    torch.save(best, work_dir / 'compact_by_hand.pth')
    note = 'compact_best.pth: it belongs to another run, an earlier one.'
    path, notes = run_report.write_run_report(work_dir, trained, experiment_name=names[0])
    assert notes == [note]
    html = path.read_text()
    assert note in html
    assert 'compact_by_hand.pth</code>' in html
    assert 'compact_best.pth</code>' not in html
    # The tool takes the newest for the run's.
    assert run('report.py', work_dir) == (0, '')
    assert f'not in the report: {note}' in capsys.readouterr().out


def test_no_sum_of_what_the_forward_pass_does_not_reach(trained, monkeypatch):
    dataset = run_report._build_dataset(trained)
    whole = run_report._cost(trained, dataset)
    assert whole.macs[1] > whole.macs[0] > 0
    monkeypatch.setattr(run_report, 'selects_by_score', lambda model: True)
    part = run_report._cost(trained, dataset)
    assert part.macs is None
    assert part.layers == whole.layers
    html = run_report.write_run_report(trained.work_dir, trained)[0].read_text()
    assert 'MACs, compact' not in html


def test_a_failing_report_costs_the_training_nothing(seg_cfg, monkeypatch):
    def fail(*args):
        raise OSError('no space left')

    monkeypatch.setattr(run_report, 'write_text', fail)
    cfg = seg_cfg(custom_hooks=[EXPAND, CONTRACT])
    runner = Runner.from_cfg(cfg)
    runner.train()
    work_dir = Path(cfg.work_dir)
    assert (work_dir / 'compact_last.pth').exists()
    assert not list(work_dir.glob('*.html'))
    (text,) = (path.read_text() for path in work_dir.glob('*/*.log'))
    assert 'WARNING - ContractHook: the report is not written: OSError: no space left' in text


def test_weights_that_could_not_be_contracted_are_named(seg_cfg, monkeypatch):
    cfg = seg_cfg(custom_hooks=[EXPAND, CONTRACT])
    runner = Runner.from_cfg(cfg)
    monkeypatch.setattr(hooks, 'contract_and_check', lambda *_: 1 / 0)
    with pytest.raises(hooks.ContractionError):
        runner.train()
    html = (Path(cfg.work_dir) / 'report.html').read_text()
    assert 'last could not be contracted: ZeroDivisionError' in html


def test_without_the_packages_it_is_refused_at_the_start(monkeypatch):
    monkeypatch.setattr(stack, 'find_spec', lambda name: None)
    ContractHook()
    with pytest.raises(ImportError, match='a report requires jinja2 and plotly: pip install'):
        ContractHook(report=True)


def test_the_tool_writes_the_same_page(trained, capsys):
    path = Path(trained.work_dir) / 'report.html'
    by_hook = path.read_text()
    path.unlink()
    assert run('report.py', trained.work_dir) == (0, '')
    assert f'wrote {path}' in capsys.readouterr().out
    assert _without_names(path.read_text()) == _without_names(by_hook)


def _without_names(html):
    """Without the time, the title, which is the config's name, and plotly's names of charts."""
    html = re.sub(r'\d{4}-\d\d-\d\d \d\d:\d\d', '', html)
    html = re.sub(r'<(title|h1)>.*?</', '', html)
    return re.sub(r'[0-9a-f]{8}-[0-9a-f-]{27}', '', html)


def test_the_tool_finds_data_that_was_moved(trained, street, capsys):
    (config,) = (p for p in Path(trained.work_dir).glob('*.py') if p.name != 'compact_config.py')
    config.write_text(config.read_text().replace(str(street), '/nowhere'))
    assert run('report.py', trained.work_dir) == (0, '')
    assert 'not in the report: Predictions: ' in capsys.readouterr().out
    option = f'val_dataloader.dataset.data_root={street}'
    assert run('report.py', trained.work_dir, '--cfg-options', option) == (0, '')
    assert 'not in the report' not in capsys.readouterr().out


def test_the_tool_refuses_what_it_cannot_report(tmp_path, monkeypatch):
    code, said = run('report.py', tmp_path)
    assert (code, said.split(': ')[0]) == (1, 'report.py')
    assert 'holds no compact_*.pth; name the work dir of a training with ContractHook' in said
    (tmp_path / 'compact_last.pth').touch()
    code, said = run('report.py', tmp_path)
    assert (code, 'but not the config of the training; copy it there' in said) == (1, True)
    monkeypatch.setattr(stack, 'find_spec', lambda name: None)
    code, said = run('report.py', tmp_path)
    assert (code, 'a report requires jinja2 and plotly' in said) == (1, True)
    assert not (tmp_path / 'report.html').exists()
