"""The tool that runs a study's classifiers as CUDA graphs: here without the graphs."""

import json
from math import cos, pi

import pytest
import torch
from mmengine.config import ConfigDict

from mmexpand.study.results import load_result
from mmexpand.study.run import run_config
from mmexpand.study.spec import Run
from mmexpand.study.statistics import summarise
from tests.tools_in_process import load
from tests.tools_in_process import run as run_tool

TOOL = 'analysis_tools/study_graphs.py'
EPOCHS = """
epochs = {'train_cfg.max_epochs': 3, 'train_cfg': dict(
    _delete_=True, type='EpochBasedTrainLoop', max_epochs=3, val_interval=2)}
for arm in arms.values():
    arm.setdefault('cfg_options', {})['train_cfg'] = epochs['train_cfg']
    arm['cfg_options']['optim_wrapper.optimizer.weight_decay'] = 0.01
arms['fixed'] = dict(arms['cl'], lr=0.05)
"""


@pytest.fixture
def graphs():
    return load(TOOL)


def train():
    assert run_tool(TOOL, 'small.py', '--device', 'cpu') == (0, '')


def test_learning_rates_are_a_runners(graphs):
    optimizer = dict(optimizer=dict(lr=0.1))
    steps = [dict(type='MultiStepLR', milestones=[1, 2], gamma=0.1)]
    rates = graphs.learning_rates(ConfigDict(optim_wrapper=optimizer, param_scheduler=steps), 3, 2)
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    cosine = [dict(type='CosineAnnealingLR', T_max=3, by_epoch=True, convert_to_iter_based=True)]
    rates = graphs.learning_rates(ConfigDict(optim_wrapper=optimizer, param_scheduler=cosine), 3, 2)
    assert rates == pytest.approx([0.05 * (1 + cos(pi * step / 6)) for step in range(6)])


@pytest.mark.parametrize('arm', ['compact', 'cl'])
def test_a_step_is_that_of_sgd(graphs, write_study, arm):
    study = write_study(EPOCHS)
    run = Run(study.arm(arm), 0.1, 0)
    images = graphs.load_images(study, 'cpu')
    trainer, other = (graphs.Trainer(study, run, images) for _ in range(2))
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
    optimizer = torch.optim.SGD(other.model.parameters(), **options)
    for _ in range(2):
        trainer.begin_epoch()
        for step in range(trainer.steps):
            trainer.step()
            inputs, labels = trainer._inputs[step], trainer._labels[step]
            optimizer.zero_grad()
            other.model(inputs, labels, mode='loss')['loss'].backward()
            optimizer.step()
        trainer.end_epoch()
    start = graphs.Trainer(study, run, images).model.state_dict()
    expected = other.model.state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-6), name
        assert not torch.equal(value, start[name]), name


def test_results_are_the_studys(write_study):
    study = write_study(EPOCHS)
    train()
    for arm, rates in (('compact', 3), ('cl', 3), ('fixed', 2)):
        assert len(list((study.results_dir / arm).glob('*.json'))) == rates
        summary = summarise(study, study.arm(arm))
        assert all('edge of those tried' in problem for problem in summary.problems)
        assert len(summary.scores) == 2
    result = load_result(study, Run(study.arm('fixed'), 0.05, 1))
    assert [step for step, _ in result['curve']] == [2 * result['steps'] // 3, result['steps']]
    assert len(result['loss']) == 3
    before = {path: path.stat().st_mtime_ns for path in study.results_dir.rglob('*.json')}
    train()
    assert {path: path.stat().st_mtime_ns for path in study.results_dir.rglob('*.json')} == before


def test_what_would_be_late_is_left_out_and_what_diverges_is_said(write_study, capsys):
    study = write_study(EPOCHS + "lrs = [1e30]\narms.pop('fixed')\narms.pop('cl')\n")
    train()
    (path,) = study.results_dir.rglob('*.json')
    assert json.loads(path.read_text())['status'] == 'diverged'
    path.unlink()
    write_study(EPOCHS)
    assert run_tool(TOOL, 'small.py', '--device', 'cpu', '--minutes', 0) == (0, '')
    assert not list(study.results_dir.rglob('*.json'))
    assert 'skipped, the time is over' in capsys.readouterr().out


def test_another_hook_is_refused(graphs, write_study):
    study = write_study(
        EPOCHS + "arms['cl']['cfg_options']['custom_hooks'] = [dict(type='EMAHook')]"
    )
    cfg = run_config(study, Run(study.arm('cl'), 0.1, 0))
    with pytest.raises(ValueError, match='EMAHook is not ExpandHook'):
        graphs.build_model(cfg)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ("['optim_wrapper.clip_grad'] = dict(max_norm=1)", 'an optim_wrapper of SGD'),
        ("['optim_wrapper.optimizer.nesterov'] = True", 'an optim_wrapper of SGD'),
        ("['load_from'] = 'net.pth'", 'trains from the start'),
        ("['train_dataloader.dataset.val_images'] = 4", 'arms differ in train_dataloader'),
    ],
)
def test_what_it_does_not_do_is_refused(graphs, write_study, options, words):
    study = write_study(EPOCHS + f"arms['cl']['cfg_options']{options}")
    run = Run(study.arm('cl'), 0.1, 0)
    with pytest.raises(ValueError, match=words):
        graphs.Trainer(study, run, graphs.load_images(study, 'cpu'))


def test_a_seed_is_the_same_beside_others_and_batches_may_differ(write_study):
    study = write_study(EPOCHS + "arms['cl']['cfg_options']['train_dataloader.batch_size'] = 4")
    train()
    path = study.result_path(Run(study.arm('fixed'), 0.05, 1))
    beside = json.loads(path.read_text())
    path.unlink()
    train()
    assert json.loads(path.read_text()) == beside
    other = load_result(study, Run(study.arm('compact'), 0.1, 0))
    assert load_result(study, Run(study.arm('cl'), 0.1, 0))['steps'] > other['steps']


def test_half_the_time_is_for_half_the_runs(graphs, write_study, monkeypatch):
    study = write_study(EPOCHS.replace('max_epochs=3', 'max_epochs=20'))
    images = graphs.load_images(study, 'cpu')
    runs = [Run(study.arm('fixed'), 0.05, seed) for seed in range(8)]
    trainers = [graphs.Trainer(study, run, images) for run in runs]
    now = [0.0]
    monkeypatch.setattr(graphs.time, 'monotonic', lambda: now[0])
    step = graphs.Trainer.step

    def slow(trainer):
        now[0] += 1
        step(trainer)

    monkeypatch.setattr(graphs.Trainer, 'step', slow)
    deadline = 2 * 8 * trainers[0].steps + 18 * 4 * trainers[0].steps
    with graphs.Progress() as bar:
        graphs.train(trainers, deadline, bar)
    assert len(list(study.results_dir.rglob('*.json'))) == 4
    assert now[0] <= deadline
