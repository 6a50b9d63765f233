"""A config of ours that drops the hooks of its base says so; default_hooks drop none."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from mmexpand.mm.config_file import open_config
from mmexpand.mm.lost_hooks import lost_hooks, warn_of_lost_hooks
from mmexpand.study.run import arm_problem
from mmexpand.study.spec import load_study
from tests.runs import log_of
from tests.tools_in_process import run

ROOT = Path(__file__).parents[2]
EXPAND = "dict(type='ExpandHook', method='cl', include='backbone.encoder', rate=2)"
FORMS = {
    'replaced': (f'custom_hooks = [{EXPAND}]', ['EMAHook', 'SyncBuffersHook']),
    'one of them': (f"custom_hooks = [dict(type='EMAHook'), {EXPAND}]", ['SyncBuffersHook']),
    'added': (f'custom_hooks = [*_base_.custom_hooks, {EXPAND}]', []),
    'default': (f'default_hooks = dict(expand={EXPAND})', []),
    'without ours': ("custom_hooks = [dict(type='EMAHook')]", []),
    'emptied': ('custom_hooks = []', []),
}


@pytest.fixture
def base(seg_cfg, tmp_path):
    cfg = seg_cfg(**{'train_cfg.max_iters': 1})
    cfg.custom_hooks = [dict(type='EMAHook'), dict(type='SyncBuffersHook')]
    cfg.dump(tmp_path / 'base.py')
    return tmp_path / 'base.py'


def write(base, text, name='config.py'):
    path = base.with_name(name)
    path.write_text(f"_base_ = '{base.name}'\n{text}\n")
    return path


@pytest.mark.parametrize('form', FORMS)
def test_hooks_of_the_base_that_are_lost(base, form):
    text, names = FORMS[form]
    found = lost_hooks(Config.fromfile(write(base, text)))
    assert found == ([(str(base), names)] if names else [])


def test_of_a_base_of_the_base(base):
    middle = write(base, FORMS['replaced'][0], 'middle.py')
    cfg = Config.fromfile(write(middle, 'randomness = dict(seed=1)'))
    assert lost_hooks(cfg) == [(str(base), ['EMAHook', 'SyncBuffersHook'])]
    # A list that is emptied on the way is meant.
    emptied = write(base, FORMS['emptied'][0], 'emptied.py')
    assert lost_hooks(Config.fromfile(write(emptied, FORMS['replaced'][0]))) == []


@pytest.mark.parametrize('place', ['.', '..bases.'])
@pytest.mark.parametrize('form', ['replaced', 'added'])
def test_of_a_pure_python_config(tmp_path, monkeypatch, place, form):
    folder = tmp_path / 'configs'
    bases = folder if place == '.' else tmp_path / 'bases'
    for path in (folder, bases):
        path.mkdir(exist_ok=True)
    (bases / 'base.py').write_text(
        'from mmengine.hooks import EMAHook\ncustom_hooks = [dict(type=EMAHook)]\n'
    )
    listed = '*custom_hooks, ' if form == 'added' else ''
    (folder / 'config.py').write_text(
        'from mmengine.config import read_base\n\nwith read_base():\n'
        f'    from {place}base import *\n\nfrom mmexpand.mm import ExpandHook\n\n'
        f"custom_hooks = [{listed}dict(type=ExpandHook, include='backbone', method='cl')]\n"
    )
    said = []
    monkeypatch.setattr('mmexpand.mm.lost_hooks.log', lambda message, level: said.append(message))
    warn_of_lost_hooks(Config.fromfile(folder / 'config.py'))
    if form == 'added':
        assert said == []
    else:
        (words,) = said
        assert 'base.py: EMAHook will not run. Write custom_hooks=[*custom_hooks, ...]' in words


def test_of_options(base):
    options = {'custom_hooks': [dict(type='ExpandHook', method='cl')]}
    assert lost_hooks(open_config(base, options)) == [(str(base), ['EMAHook', 'SyncBuffersHook'])]
    options = {'default_hooks': dict(expand=dict(type='ExpandHook', method='cl'))}
    cfg = open_config(base, options)
    assert lost_hooks(cfg) == []
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook', 'SyncBuffersHook']


def test_a_file_that_is_gone_is_no_reason_to_fail(base):
    cfg = Config.fromfile(write(base, FORMS['replaced'][0]))
    base.unlink()
    assert lost_hooks(cfg) == []


WARNING = 'EMAHook, SyncBuffersHook will not run. Write custom_hooks=[*_base_.custom_hooks'


@pytest.mark.parametrize('form', ['replaced', 'default'])
def test_training_says_so(base, form, tmp_path):
    cfg = Config.fromfile(write(base, FORMS[form][0]))
    cfg.work_dir = str(tmp_path / form)
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert any(type(hook).__name__ == 'EMAHook' for hook in runner.hooks) == (form == 'default')
    log = log_of(cfg)
    assert (WARNING in log) == (form == 'replaced')


def test_plan_and_study_say_so(base, monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr('mmexpand.mm.lost_hooks.log', lambda message, level: said.append(message))
    assert run('plan.py', write(base, FORMS['replaced'][0]), '--shape', 32, 48) == (0, '')
    assert len(said) == 1
    assert WARNING in said[0]
    study = tmp_path / 'study.py'
    study.write_text(
        "baseline = 'compact'\nmetric = 'mIoU'\nlrs = [0.01]\nseeds = [0]\ntune_seeds = [0]\n"
        "results_dir = 'results'\narms = dict(compact=dict(config='base.py'),\n"
        f"expanded=dict(config='base.py', cfg_options=dict(custom_hooks=[{EXPAND}])))\n"
    )
    study = load_study(study)
    assert [arm_problem(study.arms[name]) for name in study.arms] == [None, None]
    assert len(said) == 2
    assert WARNING in said[1]


def test_no_config_here_loses_any():
    paths = [path for path in (ROOT / 'configs').rglob('*.py') if 'study' not in path.parts]
    lost = {str(path): lost_hooks(Config.fromfile(path)) for path in paths}
    assert not {path: found for path, found in lost.items() if found}
    for path in (ROOT / 'configs/study').glob('*.py'):
        study = load_study(path)
        # The arms of a study are made by one function: the last one stands for all.
        for arm in list(study.arms.values())[-1:]:
            assert lost_hooks(open_config(arm.config, arm.cfg_options)) == [], (path, arm.name)
