"""The private parts of mmengine that are used do what they are used for."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner, ValLoop
from torch import nn

from mmexpand.mm import compat


@pytest.fixture
def runner(seg_cfg):
    return Runner.from_cfg(seg_cfg(resume=True))


def test_the_path_that_is_set_is_resumed(runner, monkeypatch):
    paths = []
    monkeypatch.setattr(runner, 'resume', paths.append)
    assert compat.resumes(runner)
    assert compat.load_path(runner) is None
    compat.set_load_path(runner, 'iter_1.pth')
    runner.load_or_resume()
    assert paths == [compat.load_path(runner)] == ['iter_1.pth']


def test_a_runner_that_does_not_resume(seg_cfg):
    assert not compat.resumes(Runner.from_cfg(seg_cfg(load_from='start.pth')))


def test_the_train_loop_is_built_where_it_is_asked_for(runner):
    assert not compat.is_training(runner)
    assert runner.train_loop
    assert compat.is_training(runner)


def test_a_val_loop_is_known_before_it_is_built(seg_cfg, runner):
    assert compat.has_val_loop(runner)
    assert isinstance(runner.val_loop, ValLoop)
    cfg = seg_cfg()
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        cfg.pop(key)
    assert not compat.has_val_loop(Runner.from_cfg(cfg))


def test_base_files_are_found(tmp_path):
    for name in ('a.py', 'b.py'):
        (tmp_path / name).write_text('x = 1\n')
    (tmp_path / 'config.py').write_text("_base_ = ['./a.py', './b.py']\n")
    found = compat.base_files(str(tmp_path / 'config.py'))
    assert list(map(Path, found)) == [tmp_path / 'a.py', tmp_path / 'b.py']
    assert compat.base_files(str(tmp_path / 'a.py')) == []


def test_hooks_that_are_set_are_called(runner):
    called = []

    class Look(Hook):
        def before_run(self, runner):
            called.append(self)

    hook = Look()
    compat.set_hooks(runner, [hook])
    runner.call_hook('before_run')
    assert called == runner.hooks == [hook]


def test_the_dictionary_in_a_config_is_the_configs(seg_cfg):
    cfg = seg_cfg()
    compat.raw(cfg)['new'] = dict(key=1)
    assert cfg.new.key == 1


def test_a_model_is_run_as_its_own_steps_run_it(runner, monkeypatch):
    calls = []

    def forward(inputs, data_samples=None, mode='tensor'):
        calls.append((inputs, data_samples, mode))

    monkeypatch.setattr(runner.model, 'forward', forward)
    data = dict(inputs=1, data_samples=2)
    monkeypatch.setattr(runner.model.data_preprocessor, 'forward', lambda data, training: data)
    runner.model.val_step(data)
    compat.run_forward(runner.model, data, 'predict')
    compat.run_forward(runner.model, (1, 2), 'predict')
    assert calls == [(1, 2, 'predict')] * 3
    assert (
        compat.run_forward.__code__.co_names[0] in type(runner.model).train_step.__code__.co_names
    )


def test_what_was_being_built_is_found():
    class Inner(nn.Module):
        def __init__(self, size):
            raise ZeroDivisionError

    class Outer(nn.Module):
        def __init__(self, inner):
            MODELS.build(inner)

    for kind in (Inner, Outer):
        MODELS.register_module(module=kind, force=True)
    try:
        for cfg, kind, arguments in (
            (dict(type='Outer', inner=dict(type='Inner', size=3)), Inner, dict(size=3)),
            (dict(type='Missing', size=3), 'Missing', dict(size=3)),
        ):
            with pytest.raises((ZeroDivisionError, KeyError)) as error:
                MODELS.build(cfg)
            assert compat.being_built(error.tb) == (kind, arguments, MODELS)
    finally:
        for kind in (Inner, Outer):
            with suppress(KeyError):
                del MODELS.module_dict[kind.__name__]
    assert compat.being_built(None) is None


def test_a_wrapper_clips_with_the_function_that_is_set():
    layer = nn.Linear(2, 3)
    wrapper = OptimWrapper(torch.optim.SGD(layer.parameters(), 1), clip_grad=dict(max_norm=1))
    assert compat.clips_as_mmengine(wrapper)
    clipped = []
    compat.set_clip(wrapper, clipped.append)
    wrapper.update_params(layer(torch.ones(1, 2)).sum())
    assert clipped == [wrapper]

    class Own(OptimWrapper):
        def _clip_grad(self):
            pass

    assert not compat.clips_as_mmengine(Own(torch.optim.SGD(layer.parameters(), 1)))
