"""One run: what its result holds, and what of it survives a kill."""

import json
import sys

import pytest
from mmengine.hooks import EMAHook
from mmengine.registry import HOOKS

from mmexpand.study import Run, StudyError
from mmexpand.study.run import (
    arm_problem,
    config_digest,
    run_config,
    shares_images,
    train,
    write_json,
)


def run_of(study, arm='compact', lr=0.1, seed=0):
    return Run(study.arm(arm), lr, seed)


@pytest.mark.parametrize('arm', ['compact', 'cl'])
def test_result(study, arm):
    run = run_of(study, arm)
    result = train(study, run)
    assert (result['arm'], result['lr'], result['seed']) == (arm, 0.1, 0)
    assert (result['status'], result['steps']) == ('ok', 8)
    assert [step for step, _ in result['curve']] == [2, 4, 6, 8]
    assert result['curve'][-1][1] == result['val']['accuracy']
    assert [step for step, _ in result['loss']] == list(range(1, 9))
    assert result['test']['accuracy'] > 50
    assert result['seconds'] > 0
    started, ended = result['period']
    assert 0 <= ended - started < 600
    assert set(result['versions']) == {'torch', 'mmengine', 'mmexpand'}
    write_json(result, study.result_path(run))
    assert study.result_path(run).stat().st_size < 6000
    assert json.loads(study.result_path(run).read_text()) == result


def test_seed_and_rate_decide(study, tmp_path, monkeypatch):
    def losses(folder, **run):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        return train(study, run_of(study, **run))['loss']

    first = losses('a')
    assert losses('b') == first
    assert losses('c', seed=1) != first
    assert losses('d', lr=0.01)[1:] != first[1:]


def test_a_loss_that_is_not_finite_ends_the_run(study):
    result = train(study, run_of(study, lr=1e30))
    assert result['status'] == 'diverged'
    assert result['reason'].startswith('the loss is ')


@HOOKS.register_module()
class ZeroEMAHook(EMAHook):
    """Averages that are told from the last weights: zeros, which call every image bright."""

    def after_train_iter(self, *args, **kwargs):
        super().after_train_iter(*args, **kwargs)
        for parameter in self.ema_model.parameters():
            parameter.data.zero_()


def test_averaged_weights_are_what_is_tested(study, with_arm):
    result = train(study, run_of(study))
    assert result['val']['accuracy'] == result['test']['accuracy'] == 100
    study = with_arm(study, 'compact', custom_hooks=[dict(type='ZeroEMAHook')])
    result = train(study, run_of(study, lr=0.11))
    assert result['val']['accuracy'] == result['test']['accuracy'] == 50


def test_contract_hook_adds_no_point(study, with_arm):
    hooks = [dict(type='ExpandHook', method='cl', include='features'), dict(type='ContractHook')]
    study = with_arm(study, 'cl', custom_hooks=hooks)
    assert [step for step, _ in train(study, run_of(study, 'cl'))['curve']] == [2, 4, 6, 8]


def test_a_finished_training_is_only_evaluated(study):
    """Killed between the last checkpoint and the validation behind it."""
    whole = train(study, run_of(study))
    points = study.work_dir / 'compact/lr0.1_seed0/validations.json'
    points.write_text(json.dumps(json.loads(points.read_text())[:-1]))
    again = train(study, run_of(study))
    for key in ('val', 'test', 'curve', 'loss', 'seconds', 'steps'):
        assert again[key] == whole[key], key


def test_a_checkpoint_that_is_gone_starts_anew(study):
    """CheckpointHook removes one before it writes the next."""
    whole = train(study, run_of(study))
    folder = study.work_dir / 'compact/lr0.1_seed0'
    (folder / 'iter_8.pth').unlink()
    again = train(study, run_of(study))
    assert again['curve'] == whole['curve']
    assert again['loss'] == whole['loss']


def test_an_arm_that_was_changed_starts_anew(study, with_arm):
    first = train(study, run_of(study))
    study = with_arm(study, 'compact', **{'train_dataloader.batch_size': 4})
    again = train(study, run_of(study))
    assert again['loss'] != first['loss']
    # Now that is what was trained last. The time of day may be another second's.
    assert train(study, run_of(study)) | dict(period=again['period']) == again


def test_what_is_resumed_is_not_load_from(study, with_arm, tmp_path):
    start = train(study, run_of(study, seed=1))
    path = (study.work_dir / 'compact/lr0.1_seed1/iter_8.pth').resolve()
    study = with_arm(study, 'compact', load_from=str(path))
    whole = train(study, run_of(study))
    assert whole['loss'] != start['loss']
    again = train(study, run_of(study))
    assert (again['loss'], again['curve']) == (whole['loss'], whole['curve'])


def test_a_config_without_a_rate(study, tmp_path):
    config = tmp_path / 'net.py'
    config.write_text(config.read_text().replace('lr=1.0, ', ''))
    with pytest.raises(StudyError, match=r'net\.py has no optim_wrapper\.optimizer\.lr'):
        run_config(study, run_of(study))


def test_a_config_that_a_package_carries(write_study):
    name = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'
    study = write_study(f"arms['stock'] = dict(config={name!r})\n")
    cfg = run_config(study, run_of(study, 'stock'))
    assert cfg.model.type == 'YOLOX' and cfg.optim_wrapper.optimizer.lr == 0.1
    assert shares_images(cfg) and not shares_images(run_config(study, run_of(study)))


def test_imports_of_an_arm(study, tmp_path, with_arm, monkeypatch):
    (tmp_path / 'of_the_arm.py').write_text('loaded = True\n')
    monkeypatch.syspath_prepend(tmp_path)
    study = with_arm(study, 'cl', custom_imports=dict(imports=['of_the_arm']))
    run_config(study, run_of(study, 'cl'))
    assert 'of_the_arm' in sys.modules


def test_what_is_wrong_with_an_arm(study, tmp_path, with_arm):
    assert arm_problem(study.arm('compact')) is None
    moved = with_arm(study, 'cl', **{'val_dataloader.dataset.data_root': 'nowhere'})
    said = arm_problem(moved.arm('cl'))
    assert said.startswith('cl cannot run: val_dataloader.dataset: data_root not found')
    (tmp_path / 'net.py').write_text('model = \n')
    assert arm_problem(study.arm('cl')).startswith('cl cannot run: ')


def test_a_config_keeps_its_other_options_of_randomness(study, with_arm):
    changed = with_arm(study, 'compact', randomness=dict(deterministic=True, seed=7))
    cfg = run_config(changed, Run(changed.arm('compact'), 0.1, 3))
    assert cfg.randomness == dict(deterministic=True, seed=3)


def test_problems_of_an_arm_are_found_before_its_first_run(study, with_arm):
    cycle = dict(type='OneCycleLR', eta_max=0.1, total_steps=8, by_epoch=False)
    hook = dict(type='ExpandHook', method='cl', include='backbone')
    for options, said in (
        (dict(param_scheduler=[cycle]), 'OneCycleLR, whose eta_max replaces'),
        (dict(custom_hooks=[hook]), 'backbone'),
    ):
        changed = with_arm(study, 'compact', **options)
        assert said in arm_problem(changed.arm('compact'))
    assert arm_problem(study.arm('cl')) is None


def test_the_lowest_rate_of_a_schedule_follows_the_rate(study, with_arm):
    schedulers = [
        dict(type='PolyLR', eta_min=0.1, end=8, by_epoch=False),
        dict(type='CosineAnnealingMomentum', eta_min=0.85, T_max=8, by_epoch=False),
    ]
    changed = with_arm(study, 'compact', param_scheduler=schedulers)
    for lr in (0.1, 0.005):  # The config's is 1.
        cfg = run_config(changed, run_of(changed, lr=lr))
        assert cfg.param_scheduler[0].eta_min == pytest.approx(lr / 10)
        assert cfg.param_scheduler[1].eta_min == 0.85
    lower = with_arm(study, 'compact', param_scheduler=[dict(schedulers[0], eta_min=0.01)])
    digests = {config_digest(one.arm('compact')) for one in (study, changed, lower)}
    assert len(digests) == 3
