"""Validation and tests run the compact network, and leave a later training as it would be."""

import pytest
import torch
from mmengine.fileio import load
from mmengine.runner import Runner

import mmexpand
from mmexpand.core.expanded_layer import ExpandedLayer
from mmexpand.surgery import is_expanded, named_units
from tests.runs import train
from tests.tools_in_process import run

NAME = 'backbone.encoder.1.1.convs.0.conv'
EMA = dict(type='EMAHook', momentum=0.1)


def hooks(*more, method='cl', **expand):
    expand = dict(type='ExpandHook', include='backbone.encoder', method=method, **expand)
    return [expand, *more, dict(type='ContractHook')]


@pytest.mark.parametrize('before', ['val', 'test'])
def test_training_is_the_same_after_an_evaluation(seg_cfg, before):
    """Weights are preserved, and a kernel with lr_mult=0 stays where it was."""
    options = dict(custom_hooks=hooks(EMA, init='preserve', rate=2))
    options['optim_wrapper.paramwise_cfg'] = dict(custom_keys={NAME: dict(lr_mult=0.0)})
    runs, evaluated = [], None
    for first in (None, before):
        cfg = seg_cfg(**options)
        cfg.work_dir += str(first)
        runner = Runner.from_cfg(cfg)
        if first:
            getattr(runner, first)()
            evaluated = is_expanded(runner.model)
        torch.manual_seed(0)
        runner.train()
        runs.append(runner)
    alone, after = runs
    start = Runner.from_cfg(seg_cfg(**options, **{'train_cfg.max_iters': 0}))
    torch.manual_seed(0)
    start.train()
    for name, unit in named_units(after.model).items():
        torch.testing.assert_close(unit.weight, named_units(alone.model)[name].weight)
        moved = (unit.weight - named_units(start.model)[name].weight).abs().max()
        assert (moved < 1e-5) == (name == NAME), name
    assert evaluated is False


def test_a_nonlinear_stage_keeps_its_options_too(seg_cfg):
    """It is expanded for the evaluation, since there is no compact network."""
    key = 'optim_wrapper.paramwise_cfg'
    cfg = seg_cfg(custom_hooks=hooks(nonlinear='relu', rate=2)[:1])
    cfg.merge_from_dict({key: dict(custom_keys={NAME: dict(lr_mult=0.0)})})
    runner = Runner.from_cfg(cfg)
    runner.val()
    assert is_expanded(runner.model)
    runner.train()
    rates = {
        id(p): group['lr'] for group in runner.optim_wrapper.param_groups for p in group['params']
    }
    for name, unit in named_units(runner.model).items():
        assert all((rates[id(p)] == 0) == (name == NAME) for p in unit.parameters()), name


@pytest.mark.parametrize('by', ['hook', 'builder'])
@pytest.mark.parametrize('method', ['cl', 'repvgg'])
def test_either_checkpoint_with_either_config_and_averages(seg_cfg, tmp_path, by, method):
    """The metrics are those of the compact network with the compact config."""
    cfg = seg_cfg(custom_hooks=hooks(EMA, method=method, rate=2))
    if by == 'builder':
        expand = {key: value for key, value in cfg.custom_hooks[0].items() if key != 'type'}
        cfg.model = dict(type='ExpandModel', model=cfg.model, **expand)
        cfg.custom_hooks = cfg.custom_hooks[1:]
    cfg.dump(tmp_path / 'expanded.py')
    train(cfg)
    work = cfg.work_dir
    found = []
    for config in (tmp_path / 'expanded.py', f'{work}/compact_config.py'):
        for checkpoint in ('compact_ema.pth', 'iter_4.pth'):
            out = tmp_path / f'{len(found)}.pkl'
            arguments = config, f'{work}/{checkpoint}', '--work-dir', tmp_path / 'test'
            assert run('test.py', *arguments, '--out', out) == (0, ''), (config, checkpoint)
            found.append(load(out))
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            same = ours['pred_sem_seg']['data'] == theirs['pred_sem_seg']['data']
            assert same.float().mean() > 0.99


def test_a_test_of_an_expanded_checkpoint_runs_its_contraction(seg_cfg):
    cfg = seg_cfg(custom_hooks=hooks(method='repvgg'))
    expected = mmexpand.contract(train(cfg).model).state_dict()
    tested = Runner.from_cfg(seg_cfg(custom_hooks=hooks(method='repvgg')))
    tested._load_from = f'{cfg.work_dir}/iter_4.pth'
    tested.test()
    assert not any(isinstance(module, ExpandedLayer) for module in tested.model.modules())
    for name, value in tested.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
