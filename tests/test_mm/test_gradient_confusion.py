"""Gradient confusion in real, short trainings, which it leaves as they are."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.registry import TRANSFORMS
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.utils.data import IterableDataset

import mmexpand
from mmexpand.analysis.confusion import cosine_similarity, density, gradients
from mmexpand.mm import gradient_confusion
from mmexpand.mm.compact_config import make_compact_config
from mmexpand.mm.dry_run_training import dry_run_training
from mmexpand.mm.gradient_confusion import GradientConfusionHook, measure, random_batches
from mmexpand.mm.models import expand_as_configured
from tests.runs import log_of, train
from tests.tools_in_process import run

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tools/demo'))

from draw_voc import draw_voc  # noqa: E402

HOOK = dict(type='GradientConfusionHook', pairs=3)
EXPAND = dict(type='ExpandHook', method='cl', include='backbone.encoder', rate=2)
FLIP = {
    'train_dataloader.sampler.shuffle': True,
    'train_dataloader.dataset.pipeline': [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PhotoMetricDistortion'),
        dict(type='MixPrevious'),
        dict(type='PackSegInputs'),
    ],
    'model.decode_head.dropout_ratio': 0.5,
}


@TRANSFORMS.register_module()
class MixPrevious(BaseTransform):
    """Keeps an image for the next sample, as mosaics with a cache do."""

    previous = 0.0

    def transform(self, results):
        image = results['img'].astype(np.float32)
        mixed, self.previous = image + self.previous, image
        return dict(results, img=mixed)


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
    cfg = seg_cfg(custom_hooks=[EXPAND], **FLIP)
    runner = Runner.from_cfg(cfg)
    expand_as_configured(runner.model, cfg)
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
    # It was killed later than at its last checkpoint.
    content = read(cfg)
    content['measured'].append(dict(content['measured'][-1], iter=4))
    (Path(cfg.work_dir) / 'gradient_confusion.json').write_text(json.dumps(content))
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
    dry_run_training(cfg)
    assert not (Path(cfg.work_dir) / 'gradient_confusion.json').exists()


@pytest.mark.parametrize(
    ('options', 'message'),
    [(dict(pairs=1), 'pairs must be at least 2'), (dict(interval=0), 'interval must be at least')],
)
def test_bad_options(seg_cfg, options, message):
    with pytest.raises(ValueError, match=message):
        Runner.from_cfg(seg_cfg(custom_hooks=[dict(HOOK, **options)]))


def test_what_is_missing_is_named_before_training(seg_cfg, monkeypatch):
    with pytest.raises(ValueError, match='cannot draw batches from an Iter'):
        loader = SimpleNamespace(dataset=Stream())
        GradientConfusionHook().before_train(SimpleNamespace(train_dataloader=loader))
    monkeypatch.setattr('mmexpand.stack.find_spec', lambda name: None)
    with pytest.raises(
        ImportError, match='GradientConfusionHook requires scipy: pip install scipy'
    ):
        GradientConfusionHook()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def test_a_training_without_a_gradient_goes_on(seg_cfg):
    cfg = seg_cfg(custom_hooks=[HOOK], **{'model.decode_head.loss_decode.loss_weight': 0.0})
    runner = train(cfg)
    assert runner.iter == 4
    assert not (Path(cfg.work_dir) / 'gradient_confusion.json').exists()
    log = log_of(cfg)
    assert '3 of 3 pairs at iteration 4 are skipped: a gradient is zero or not finite' in log


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
    batches = iter(random_batches(loader, 6, seed=0))
    for _ in range(3):
        samples = [s for _ in range(2) for s in next(batches)['data_samples']]
        assert len({sample.img_path for sample in samples}) == 4


def test_a_detector(tmp_path):
    """Its data set and its loss are of another kind; its network has no norms."""
    draw_voc(tmp_path / 'voc', num_train=8, num_test=2, size=(200, 120))
    config = ROOT / 'configs/demo/yolo-lite_expand-cl-r4_2xb8-400iters_drawn-voc-160x160.py'
    cfg = Config.fromfile(config)
    cfg.train_dataloader.dataset.data_root = f'{tmp_path}/voc/'
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = None
    cfg.custom_hooks = [dict(type='ExpandHook', method='cl', include='backbone', rate=1), HOOK]
    cfg.work_dir = str(tmp_path / 'work_dir')
    train(cfg)
    for record in read(cfg)['measured']:
        assert record['factors']['minimum'] != record['folded']['minimum']


def test_two_processes_measure_the_same_as_one(seg_cfg, tmp_path):
    cfg = seg_cfg(custom_hooks=[EXPAND, HOOK])
    train(cfg)
    alone = read(cfg)['measured'][0]
    cfg.work_dir = str(tmp_path / 'two')
    cfg.dump(tmp_path / 'two.py')
    env = dict(os.environ, OMP_NUM_THREADS='1', PORT=str(get_free_port()))
    env['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{env["PATH"]}'
    command = ['bash', str(ROOT / 'tools/dist_train.sh'), str(tmp_path / 'two.py'), '2']
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = read(cfg)['measured']
    assert first['folded']['similarities'] == pytest.approx(
        alone['folded']['similarities'], abs=1e-4
    )
    assert last['iter'] == 4


def test_plot_of_several_runs(seg_cfg, tmp_path, capsys):
    for name in ('a', 'b'):
        cfg = seg_cfg(custom_hooks=[EXPAND, HOOK])
        cfg.work_dir = str(tmp_path / name)
        train(cfg)
    out = tmp_path / 'confusion.png'
    runs = [tmp_path / 'a', tmp_path / 'b', tmp_path / 'a']
    tool = 'analysis_tools/plot_confusion.py'
    assert run(tool, *runs, '--legend', 'net', 'net', 'other', '--out', out) == (0, '')
    assert out.stat().st_size > 10_000
    status, words = run(tool, tmp_path, '--out', out)
    assert status
    assert 'holds no gradient_confusion.json; name the work dir' in words
    assert run(tool, *runs, '--legend', 'net', '--out', out)[0]
    assert '--legend has 1 names for 3 runs' in capsys.readouterr().err


def test_it_is_measured_in_training_mode(seg_cfg, monkeypatch):
    """A validation at the end leaves the network in eval mode."""
    modes = []

    def gradients(network, data):
        modes.append(network.training)
        return found(network, data)

    found = gradient_confusion._gradients
    monkeypatch.setattr(gradient_confusion, '_gradients', gradients)
    train(seg_cfg(custom_hooks=[EXPAND, HOOK]))
    assert modes
    assert all(modes)
