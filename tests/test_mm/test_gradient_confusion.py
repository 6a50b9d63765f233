"""Gradient confusion in real, short trainings, which it leaves as they are."""

import json
import math
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner
from torch import nn

import mmexpand
from mmexpand.analysis.confusion import cosine_similarity, density, gradients
from mmexpand.mm.compact_config import make_compact_config
from mmexpand.mm.gradient_confusion import measure, random_batches
from mmexpand.mm.trial import try_training

HOOK = dict(type='GradientConfusionHook', pairs=3)
EXPAND = dict(type='ExpandHook', include='backbone.encoder', rate=2)
FLIP = {
    'train_dataloader.sampler.shuffle': True,
    'train_dataloader.dataset.pipeline': [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PhotoMetricDistortion'),
        dict(type='PackSegInputs'),
    ],
    'model.decode_head.dropout_ratio': 0.5,
}


def train(cfg) -> Runner:
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def read(cfg) -> dict:
    return json.loads((Path(cfg.work_dir) / 'gradient_confusion.json').read_text())


def test_training_is_the_same_bit_for_bit(seg_cfg, tmp_path):
    """With dropout, random augmentation, batch norms, momentum and a shuffled data set."""
    ema = dict(type='EMAHook', momentum=0.1)
    states = {}
    for name, hooks in (('with', [dict(HOOK, interval=1)]), ('without', [])):
        cfg = seg_cfg(custom_hooks=[EXPAND, ema, *hooks], **FLIP)
        cfg.work_dir = str(tmp_path / name)
        runner = train(cfg)
        states[name] = {
            **runner.model.state_dict(),
            **{
                f'momentum.{i}': s['momentum_buffer']
                for i, s in enumerate(runner.optim_wrapper.optimizer.state.values())
            },
            'random': torch.get_rng_state(),
        }
    assert list(states['with']) == list(states['without'])
    for key, value in states['without'].items():
        assert torch.equal(states['with'][key], value), key
    measured = json.loads((tmp_path / 'with/gradient_confusion.json').read_text())['measured']
    assert [record['iter'] for record in measured] == [0, 1, 2, 3, 4]


def test_what_is_written(seg_cfg):
    cfg = seg_cfg(custom_hooks=[EXPAND, HOOK], **FLIP)
    train(cfg)
    content = read(cfg)
    assert [record['iter'] for record in content['measured']] == [0, 4]
    for record in content['measured']:
        for space in ('factors', 'folded'):
            values = record[space]['similarities']
            assert len(values) == 3
            assert all(-1 <= value <= 1 for value in values)
            assert record[space]['minimum'] == min(values)
        assert record['factors'] != record['folded']
    for points, values in content['density'].values():
        step = points[1] - points[0]
        assert len(points) == len(values) == 401
        assert 0.2 < sum(values) * step <= 1.01
    assert (Path(cfg.work_dir) / 'gradient_confusion.png').stat().st_size > 10_000
    assert [path.name for path in Path(cfg.work_dir).glob('.*')] == []


def test_the_same_batches_for_every_network(seg_cfg):
    """A compact network at the folded weights has the similarities of the folded kernels."""
    runner = Runner.from_cfg(seg_cfg(custom_hooks=[EXPAND], **FLIP))
    runner.call_hook('before_run')
    runner.model.decode_head.dropout = None
    loader = runner.build_dataloader(runner.train_dataloader)
    expanded = measure(runner.model, loader, 3, seed=1)
    compact = measure(mmexpand.contract(runner.model), loader, 3, seed=1)
    assert compact['factors'] == compact['folded'] == expanded['folded']
    assert measure(runner.model, loader, 3, seed=1) == expanded
    assert measure(runner.model, loader, 3, seed=2) != expanded


def test_a_resumed_run_goes_on(seg_cfg):
    hooks = [EXPAND, dict(HOOK, interval=2)]
    whole = seg_cfg(custom_hooks=hooks)
    train(whole)
    expected = read(whole)
    cfg = seg_cfg(custom_hooks=hooks)
    cfg.train_cfg.max_iters = 2
    train(cfg)
    resumed = seg_cfg(custom_hooks=hooks, resume=True)
    train(resumed)
    assert read(resumed) == expected
    assert [record['iter'] for record in expected['measured']] == [0, 2, 4]


def test_epochs_are_counted_where_there_are_some(seg_cfg):
    cfg = seg_cfg(
        custom_hooks=[HOOK],
        train_cfg=dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=3),
        param_scheduler=None,
        **{'train_dataloader.sampler.type': 'DefaultSampler'},
    )
    train(cfg)
    content = read(cfg)
    assert [record['iter'] for record in content['measured']] == [0, 2, 4, 6]
    assert all(record['factors'] == record['folded'] for record in content['measured'])


def test_the_compact_config_and_a_trial_know_nothing_of_it(seg_cfg):
    cfg = seg_cfg(custom_hooks=[EXPAND, HOOK, dict(type='ContractHook')])
    assert 'custom_hooks' not in make_compact_config(cfg)
    try_training(cfg)
    assert not (Path(cfg.work_dir) / 'gradient_confusion.json').exists()


@pytest.mark.parametrize(
    ('options', 'message'),
    [(dict(pairs=1), 'pairs must be at least 2'), (dict(interval=0), 'interval must be at least')],
)
def test_bad_options(seg_cfg, options, message):
    with pytest.raises(ValueError, match=message):
        Runner.from_cfg(seg_cfg(custom_hooks=[dict(HOOK, **options)]))


def test_gradients_and_their_similarity():
    model = nn.Linear(2, 1, bias=False)
    model.register_parameter('unused', nn.Parameter(torch.ones(3)))
    model.register_parameter('frozen', nn.Parameter(torch.ones(3), requires_grad=False))
    x = gradients(model, model(torch.tensor([1.0, 0.0])).sum())
    y = gradients(model, model(torch.tensor([1.0, 1.0])).sum())
    assert [g.tolist() for g in x] == [[[1, 0]], [0, 0, 0]]
    assert cosine_similarity(x, y) == pytest.approx(math.sqrt(0.5), abs=1e-12)
    assert cosine_similarity(x, [-g for g in x]) == -1
    assert math.isnan(cosine_similarity(x, [0 * g for g in x]))


def test_no_density_of_one_value():
    assert density([0.5, 0.5]) == ([], [])
    values = density([-0.5, 0.5])[1]
    assert values == pytest.approx(values[::-1])


def test_random_batches_are_of_whole_epochs(seg_cfg):
    runner = Runner.from_cfg(seg_cfg(custom_hooks=[]))
    loader = runner.build_dataloader(runner.train_dataloader)
    batches = random_batches(loader)
    for _ in range(3):
        samples = [s for _ in range(2) for s in next(batches)['data_samples']]
        assert len({sample.img_path for sample in samples}) == 4
