"""The dry run before training: it refuses what would fail at the end, and leaves no trace."""

import random
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from mmseg.datasets import CityscapesDataset
from mmseg.evaluation import IoUMetric
from mmseg.models import EncoderDecoder
from mmseg.registry import DATASETS, METRICS, MODELS, TRANSFORMS

from mmexpand import ExpandedConv2d
from mmexpand.mm import dry_run as dry_run_module
from mmexpand.mm import dry_run_training as dry_run_training_module
from mmexpand.mm.dry_run import DryRunError
from mmexpand.mm.dry_run_training import dry_run_training
from mmexpand.surgery.checkpoint import load_checkpoint
from tests.runs import log_of, train

EXPAND = dict(type='ExpandHook', method='cl', include='backbone.encoder', rate=2)
EMA = dict(type='EMAHook', momentum=0.1)
CONTRACT = dict(type='ContractHook')


@TRANSFORMS.register_module()
class AddEarlier(BaseTransform):
    """Mixes in the image before, as mosaics with a cache do; random in all three ways."""

    earlier = None

    def transform(self, results):
        now = results['img'].astype(np.float32)
        if self.earlier is not None:
            now = now + random.random() * self.earlier + np.random.rand() + torch.rand(1).item()
        self.earlier = results['img'].astype(np.float32)
        return dict(results, img=now)


@HOOKS.register_module()
class WatchStart(Hook):
    """Keeps the state that the first iteration finds."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 0:
            metrics = runner.val_loop.evaluator.metrics if runner._val_loop else []
            runner.seen = dict(
                torch=torch.get_rng_state().tolist(),
                numpy=np.random.get_state()[1].tolist(),
                python=random.getstate(),
                batch=[image.tolist() for image in data_batch['inputs']],
                results=[metric.results for metric in metrics],
                training=[module.training for module in runner.model.modules()],
                history=sorted(runner.message_hub.log_scalars),
            )


LOADERS = {
    'simple': {},
    'workers': {
        'train_dataloader.num_workers': 1,
        'train_dataloader.persistent_workers': True,
        'val_dataloader.num_workers': 1,
        'val_dataloader.persistent_workers': True,
    },
    'epochs': {
        'train_dataloader.sampler': dict(type='DefaultSampler', shuffle=True),
        'default_hooks.checkpoint.by_epoch': True,
        'param_scheduler': [],
    },
    'no val': dict(val_dataloader=None, val_cfg=None, val_evaluator=None),
}


@pytest.mark.parametrize('loaders', LOADERS)
def test_training_is_bit_for_bit_the_same(seg_cfg, monkeypatch, loaders):
    runs = []
    for dry in (True, False):
        if not dry:
            monkeypatch.setattr('mmexpand.mm.dry_run.dry_run', lambda *args: None)
        cfg = seg_cfg(
            custom_hooks=[EXPAND, EMA, dict(type='WatchStart'), CONTRACT],
            **LOADERS[loaders],
        )
        cfg.train_dataloader.dataset.pipeline.insert(2, dict(type='AddEarlier'))
        cfg.train_dataloader.dataset.pipeline.insert(2, dict(type='RandomFlip', prob=0.5))
        if loaders == 'epochs':
            cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2)
        cfg.model.decode_head.dropout_ratio = 0.5
        cfg.work_dir += str(dry)
        runs.append(train(cfg))
        assert ('dry run on one batch: 3 layers contracted' in log_of(cfg)) == dry
        assert Path(cfg.work_dir, 'compact_last.pth').exists()
    assert runs[0].seen == runs[1].seen
    with_run, without = (runner.model.state_dict() for runner in runs)
    for name, value in without.items():
        assert torch.equal(with_run[name], value), name


def test_a_run_that_is_resumed_is_tried_too(seg_cfg):
    cfg = seg_cfg(**{'train_cfg.max_iters': 2})
    train(cfg)
    resumed = seg_cfg(resume=True, work_dir=cfg.work_dir)
    assert train(resumed).iter == 4
    # Two logs, or one where both began within a second.
    logs = [path.read_text() for path in Path(cfg.work_dir).glob('*/*.log')]
    assert sum(log.count('dry run on one batch') for log in logs) == 2


@MODELS.register_module()
class Locked(EncoderDecoder):
    """Holds what cannot be copied, from its second copy on (EMAHook makes none here)."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lock = threading.Lock()


@MODELS.register_module()
class CannotPredict(EncoderDecoder):
    """Fails in validation."""

    def predict(self, *args, **kwargs):
        raise KeyError('img_path')


@MODELS.register_module()
class Other(EncoderDecoder):
    """Another network each time it is built: no config is enough to build it again."""

    times = 0

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        Other.times += 1
        self.add_module(f'extra_{Other.times}', torch.nn.Linear(2, 2))


@DATASETS.register_module()
class ObjectMeta(CityscapesDataset):
    """Has an object in its metainfo that no checkpoint can hold."""

    METAINFO = dict(CityscapesDataset.METAINFO, source=dict(root=Path('data')))


REFUSED = {
    'copy': ({'model.type': 'Locked'}, '"copy the model" would fail.*lock'),
    'predict': ({'model.type': 'CannotPredict'}, 'evaluate one batch.*KeyError.*img_path'),
    'config': ({'model.type': 'Other'}, r'from its config.*extra_\d'),
    'meta': (
        {'train_dataloader.dataset.type': 'ObjectMeta'},
        r'serialise.*dataset_meta\.source\.root is a PosixPath.*metainfo',
    ),
}


@pytest.mark.parametrize(('changes', 'words'), REFUSED.values(), ids=REFUSED)
def test_what_would_fail_at_the_end_is_refused(seg_cfg, changes, words):
    cfg = seg_cfg(**changes)
    with pytest.raises(DryRunError, match=words) as caught:
        train(cfg)
    assert 'post-training step' in str(caught.value)
    assert 'Iter(train)' not in log_of(cfg)
    assert not list(Path(cfg.work_dir).glob('*.pth'))


def test_a_wrong_contraction_is_refused_with_its_layers(seg_cfg, monkeypatch):
    right = ExpandedConv2d.to_conv

    def wrong(self):
        conv = right(self)
        conv.weight.data[0] += 1
        return conv

    monkeypatch.setattr(ExpandedConv2d, 'to_conv', wrong)
    cfg = seg_cfg()
    with pytest.raises(DryRunError, match=r'3 of 3 layers are wrong.*backbone\.enc.*exclude=\['):
        train(cfg)
    assert 'Iter(train)' not in log_of(cfg)


def test_what_cannot_be_read_back_is_refused(seg_cfg, monkeypatch):
    real = dry_run_module.compact_checkpoint

    def with_object(*args):
        checkpoint = real(*args)
        checkpoint['meta']['strange'] = threading.Event
        return checkpoint

    monkeypatch.setattr(dry_run_module, 'compact_checkpoint', with_object)
    with pytest.raises(DryRunError, match=r'serialise.*threading\.Event'):
        train(seg_cfg())


@METRICS.register_module()
class NeedsAll(IoUMetric):
    """Cannot be computed on one batch."""

    def compute_metrics(self, results):
        if len(results) < 4:
            raise ValueError('too few images')
        return super().compute_metrics(results)


def test_a_metric_that_needs_more_than_a_batch_is_no_refusal(seg_cfg):
    cfg = seg_cfg(**{'val_evaluator.type': 'NeedsAll'})
    assert train(cfg).iter == 4
    assert 'failed on one batch, but may work on all data (ValueError: too' in log_of(cfg)
    meta = load_checkpoint(f'{cfg.work_dir}/compact_last.pth')['meta']['mmexpand']
    assert meta['metrics_compact']['mIoU'] > 0


def test_the_log_has_no_table_of_one_batch(seg_cfg):
    cfg = seg_cfg(**{'train_cfg.val_interval': 100, 'train_cfg.max_iters': 3})
    cfg.train_cfg.val_begin = 100
    train(cfg)
    assert log_of(cfg).count('per class results') == 1


def test_the_expanded_model_is_evaluated_on_request_only(seg_cfg, monkeypatch):
    calls = []
    step = EncoderDecoder.val_step
    monkeypatch.setattr(
        EncoderDecoder, 'val_step', lambda self, data: calls.append(self) or step(self, data)
    )
    for wanted, passes in ((False, 1), (True, 2)):
        calls.clear()
        hook = dict(CONTRACT, evaluate_expanded=wanted)
        cfg = seg_cfg(custom_hooks=[EXPAND, hook], **{'train_cfg.max_iters': 0})
        train(cfg)
        # Two batches in each pass, and no dry run of a training without a step.
        assert len(calls) == 2 * passes
        report = load_checkpoint(f'{cfg.work_dir}/compact_last.pth')['meta']['mmexpand']
        assert ('metrics_expanded' in report) == wanted
        if wanted:
            assert report['metrics_expanded'] == report['metrics_compact']


def test_a_trial_leaves_no_visualizer_behind(seg_cfg):
    """Runners share one by its name, and this one wrote into a folder that is gone."""
    backends = [dict(type='LocalVisBackend')]
    visualizer = dict(type='SegLocalVisualizer', name='of_a_trial', vis_backends=backends)
    cfg = seg_cfg(visualizer=visualizer)
    dry_run_training(cfg)
    assert cfg.visualizer.name == 'of_a_trial'
    assert not Visualizer.check_instance_created('of_a_trial')
    Runner.from_cfg(cfg).train()
    assert list(Path(cfg.work_dir).glob('*/vis_data/scalars.json'))


def test_a_dry_run_of_averages_and_without_validation(seg_cfg, monkeypatch):
    """An average that begins later, and nothing to validate with: both train."""
    cfg = seg_cfg(custom_hooks=[dict(type='EMAHook', begin_iter=4)])
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        cfg.pop(key)
    done = dry_run_training(cfg)
    assert done.loss > 0
    assert done.memory > 1e8
    # As on Windows.
    monkeypatch.setitem(sys.modules, 'resource', None)
    assert dry_run_training_module._peak_memory() is None


@pytest.mark.parametrize('name', ['mIoU', 'auto', 'mIou'])
def test_a_metric_of_save_best_that_does_not_exist_is_warned_of(seg_cfg, caplog, name):
    cfg = seg_cfg(custom_hooks=[EXPAND, CONTRACT], **{'default_hooks.checkpoint.save_best': name})
    with suppress(KeyError):  # From mmengine, at the first validation.
        train(cfg)
    assert ("save_best='mIou' is not a metric" in log_of(cfg)) == (name == 'mIou')
