"""A config with and without blocks: ``tools/study.py CONFIG --methods ...``."""

import json
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmexpand.mm.models import build_compact_model
from mmexpand.study import StudyError, schedule
from mmexpand.study.one_config import OneConfig, _metric_of, best_checkpoint, study_of
from mmexpand.study.run import arm_config, train, write_json
from mmexpand.surgery.checkpoint import load_checkpoint
from tests.tools_in_process import run

OPTIONS = ('--methods', 'bn', '--lrs', '0.1', '0.02', '--include', 'features', '--seeds', '2')


@pytest.fixture
def here(write_study, monkeypatch):
    """Runs train in this process; the runs, in order."""
    made = []

    def in_process(study, one, *_):
        made.append(str(one))
        write_json(train(study, one), study.result_path(one))
        return schedule.load_result(study, one)

    monkeypatch.setattr(schedule, '_run', in_process)
    return made


def test_one_command_compares_and_ends_with_the_best_compact_checkpoint(here, capsys):
    assert run('study.py', 'net.py', *OPTIONS, '--cfg-options', 'train_cfg.max_iters=6') == (0, '')
    output = capsys.readouterr().out
    assert len(here) == 6
    assert '| compact | ' in output and '| bn | ' in output
    folder = Path('work_dirs/net_study')
    for name in ('study.md', 'study.json', 'curves.png', 'differences.png', 'study.html'):
        assert (folder / name).is_file()
    assert f'wrote to {folder}: study.md, study.json, curves.png, differences.png' in output
    path = Path(output.split('Best compact checkpoint: ')[1].splitlines()[0])
    results = [json.loads(file.read_text()) for file in folder.glob('results/*/*.json')]
    assert {result['steps'] for result in results} == {6}
    rates = json.loads((folder / 'study.json').read_text())['arms']
    finals = [r for r in results if r['lr'] == rates[r['arm']]['lr']]
    best = max(finals, key=lambda result: result['val']['accuracy'])
    assert f'{best["val"]["accuracy"]:g} (val)' in output
    model = build_compact_model(Config.fromfile('net.py'))
    model.load_state_dict(load_checkpoint(path)['state_dict'])


def test_a_block_is_trained_and_contracted(here):
    study = study_of(
        OneConfig('net.py', ['bn'], [0], lrs=[0.1], expansion=dict(include='features'))
    )
    schedule.run_study(study)
    for arm, name in (('bn', 'compact_last.pth'), ('compact', 'iter_8.pth')):
        weights = load_checkpoint(study.work_dir / arm / 'lr0.1_seed0' / name)['state_dict']
        build_compact_model(Config.fromfile('net.py')).load_state_dict(weights)
    expanded = load_checkpoint(study.work_dir / 'bn/lr0.1_seed0/iter_8.pth')['state_dict']
    assert any(key.endswith('norm.running_var') for key in expanded)


def test_the_name_of_a_study_is_one_folder(write_study):
    with pytest.raises(StudyError, match=r'--name exp/a must be a folder name without a path'):
        study_of(OneConfig('net.py', ['bn'], name='exp/a'))


def test_the_best_run_is_chosen_on_the_validation_split(write_study, put):
    study = study_of(OneConfig('net.py', ['bn', 'cl'], [0, 1], lrs=[0.1]))
    assert best_checkpoint(study) is None
    for arm, seed, val, test in (('bn', 0, 60, 99), ('bn', 1, 70, 50), ('compact', 0, 65, 60)):
        put(study, arm, 0.1, seed, val=val, test=test)
    folder = study.work_dir / 'bn/lr0.1_seed1'
    assert best_checkpoint(study) is None
    folder.mkdir(parents=True)
    torch.save({}, folder / 'compact_last.pth')
    chosen, path = best_checkpoint(study)
    assert (str(chosen), path) == ('bn, lr 0.1, seed 1', folder / 'compact_last.pth')
    torch.save({}, folder / 'compact_ema.pth')  # Averaged weights are what was measured.
    assert best_checkpoint(study)[1] == folder / 'compact_ema.pth'


def test_all_arms_have_the_users_hooks(write_study):
    options = {'default_hooks.ema.type': 'EMAHook', 'default_hooks.checkpoint.interval': 3}
    study = study_of(OneConfig('net.py', ['bn'], [0], lrs=[0.1], cfg_options=options))
    hooks = {name: arm_config(arm).default_hooks for name, arm in study.arms.items()}
    assert hooks['bn'].keys() - hooks['compact'].keys() == {'expand', 'contract'}
    assert hooks['bn'].ema == hooks['compact'].ema == dict(type='EMAHook')
    assert hooks['bn'].checkpoint.interval == hooks['compact'].checkpoint.interval == 3


def test_a_study_goes_on_with_more_seeds_but_not_with_other_options(write_study):
    one = dict(config='net.py', methods=['bn'], lrs=[0.1])
    study_of(OneConfig(**one))
    assert study_of(OneConfig(**one | dict(seeds=range(5)))).seeds == (0, 1, 2, 3, 4)
    assert [*study_of(OneConfig(**one | dict(methods=['bn', 'cl']))).arms] == [
        'compact',
        'bn',
        'cl',
    ]
    # A second call in the same folder leaves the arms of the first.
    assert [*study_of(OneConfig(**one | dict(methods=['do']))).arms] == [
        'compact',
        'bn',
        'cl',
        'do',
    ]
    with pytest.raises(StudyError, match='other options for bn; choose another --name'):
        study_of(OneConfig(**one, expansion=dict(include='head')))
    assert study_of(OneConfig(**one, expansion=dict(include='head'), name='head')).name == 'head'


def test_custom_imports_and_hooks_of_the_config_stay(write_study):
    extra = "custom_hooks = [dict(type='EMAHook')]\n"
    Path('net.py').write_text(
        Path('net.py').read_text().replace("['mmexpand']", "['json']") + extra
    )
    arm = study_of(OneConfig('net.py', ['bn'])).arm('bn')
    cfg = Config.fromfile('net.py')
    cfg.merge_from_dict(arm.cfg_options)
    assert cfg.custom_imports.imports == ['json', 'mmexpand']
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook']
    assert cfg.default_hooks.expand == dict(type='ExpandHook', method='bn')
    assert cfg.default_hooks.checkpoint.type == 'CheckpointHook'


@pytest.mark.parametrize(
    ('change', 'arguments', 'words'),
    [
        ('', ['net.py', '--lrs', '0.1'], '--lrs requires --methods'),
        ('', ['nowhere.py', '--methods', 'bn'], r'nowhere\.py: no such file'),
        ('', ['net.py', '--methods', 'bn', '--seeds', '0'], '--seeds 0 trains nothing'),
        (
            "default_hooks.update(expand=dict(type='ExpandHook', method='cl'))",
            ['net.py', '--methods', 'bn'],
            r'net\.py expands already',
        ),
        (
            "val_evaluator = dict(type='MyMetric')",
            ['net.py', '--methods', 'bn'],
            r'unknown \(MyMetric\); name one with --metric',
        ),
    ],
)
def test_bad_input(write_study, capsys, change, arguments, words):
    Path('net.py').write_text(f'{Path("net.py").read_text()}\n{change}\n')
    status, said = run('study.py', *arguments)
    assert status
    assert re.search(words, said + capsys.readouterr().err)


def test_bad_options_of_a_block_are_refused_before_a_file_is_written(write_study):
    for methods, expansion in ((['bn', 'repvg'], {}), (['cl'], dict(rate=-1))):
        with pytest.raises(ValueError, match=r'repvg|rate'):
            study_of(OneConfig('net.py', methods, [0], expansion=expansion))
    assert not Path('work_dirs').exists()


@pytest.mark.parametrize(
    ('metric', 'rule'), [('rmse', {'default_hooks.checkpoint.rule': 'less'}), ('val_loss', {})]
)
def test_a_metric_whose_smaller_values_are_better_is_refused(write_study, metric, rule):
    """mmengine infers the rule of a loss."""
    options = {'default_hooks.checkpoint.save_best': metric, **rule}
    with pytest.raises(ValueError, match=f"rule='less' for {metric}"):
        study_of(OneConfig('net.py', ['bn'], [0], cfg_options=options))


def test_options_that_are_not_given_again_stay(write_study):
    first = study_of(OneConfig('net.py', ['bn'], range(5), 'other', lrs=[0.1, 0.2]))
    again = study_of(OneConfig('net.py', ['bn']))
    assert (again.seeds, again.lrs) == (first.seeds, first.lrs) == ((0, 1, 2, 3, 4), (0.1, 0.2))
    assert again.metric == first.metric == 'other'
    assert study_of(OneConfig('net.py', ['bn'], [0])).seeds == (0,)


def test_an_invalid_study_does_not_replace_the_former_one(write_study):
    study = study_of(OneConfig('net.py', ['bn'], lrs=[0.1]))
    before = study.path.read_text()
    with pytest.raises(StudyError, match='lrs must not repeat a value'):
        study_of(OneConfig('net.py', ['bn'], lrs=[0.1, 0.1]))
    assert study.path.read_text() == before


def test_values_that_are_not_finite_are_written(write_study):
    options = {'optim_wrapper.clip_grad.max_norm': float('inf')}
    study = study_of(OneConfig('net.py', ['bn'], cfg_options=options))
    assert arm_config(study.arm('bn')).optim_wrapper.clip_grad.max_norm == float('inf')
    study_of(OneConfig('net.py', ['bn'], cfg_options=options))


@pytest.mark.parametrize(
    ('evaluator', 'metric'),
    [
        (dict(type='CocoMetric', metric=['bbox', 'segm']), 'coco/bbox_mAP'),
        (dict(type='CocoMetric', prefix='mine'), 'mine/bbox_mAP'),
        (dict(type='CocoMetric', metric='segm'), None),
        (dict(type='IoUMetric', iou_metrics=['mDice']), None),
        (dict(type='IoUMetric', prefix='street'), 'street/mIoU'),
        (dict(type='Accuracy', topk=(1, 5)), 'accuracy/top1'),
        (dict(type='TopAccuracy'), 'accuracy'),
    ],
)
def test_the_metric_is_named_as_the_evaluator_logs_it(evaluator, metric):
    assert _metric_of(evaluator) == metric
