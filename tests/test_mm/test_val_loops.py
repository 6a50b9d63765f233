"""Val loops, evaluators and training data of other kinds, up to the compact network."""

import pickle
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
from mmengine.config import Config, ConfigDict
from mmengine.registry import LOOPS, METRICS
from mmengine.runner import Runner, ValLoop
from mmseg.evaluation import IoUMetric

from mmexpand.surgery.checkpoint import load_checkpoint
from tests.tools_in_process import load, run

HOOKS = [
    dict(type='ExpandHook', method='cl', include='backbone.encoder', rate=2),
    dict(type='ContractHook'),
]


@LOOPS.register_module()
class TellsHooksOnly(ValLoop):
    """As mmdet's loop over teacher and student, which returns nothing."""

    def run(self):
        super().run()


@METRICS.register_module()
class KeepsFiles(IoUMetric):
    """A metric with a temporary folder, which goes with it, as mmdet's CityScapesMetric."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.folder = tempfile.TemporaryDirectory()

    def process(self, data_batch, data_samples):
        Path(self.folder.name, 'prediction.txt').touch()
        super().process(data_batch, data_samples)

    def __del__(self):
        self.folder.cleanup()


def compact(cfg) -> dict:
    Runner.from_cfg(cfg).train()
    return load_checkpoint(Path(cfg.work_dir) / 'compact_last.pth')['meta']['mmexpand']


def test_metrics_that_a_loop_tells_hooks_only(seg_cfg):
    expected = compact(seg_cfg(custom_hooks=HOOKS))['metrics_compact']
    found = compact(seg_cfg(custom_hooks=HOOKS, **{'val_cfg.type': 'TellsHooksOnly'}))
    assert found['metrics_compact'] == expected
    assert expected['mIoU'] > 0


@pytest.mark.parametrize('times', [1, 2])
def test_a_metric_keeps_its_files_after_the_dry_run(seg_cfg, times):
    hooks = [*HOOKS[:-1], *[HOOKS[-1]] * times]
    found = compact(seg_cfg(custom_hooks=hooks, **{'val_evaluator.type': 'KeepsFiles'}))
    assert found['metrics_compact']['mIoU'] > 0


@pytest.mark.parametrize('seed', range(3))
def test_training_images_of_several_sizes_without_validation(seg_cfg, seed):
    """They are padded to one size in training, and in training only."""
    changes = dict.fromkeys(('val_dataloader', 'val_cfg', 'val_evaluator'))
    cfg = seg_cfg(custom_hooks=HOOKS, **changes, **{'randomness.seed': seed})
    cfg.model.data_preprocessor.update(size=(48, 64), pad_val=0, seg_pad_val=255)
    cfg.train_dataloader.dataset.pipeline[2:2] = [
        dict(type='RandomResize', scale=(48, 32), ratio_range=(0.5, 1.5), keep_ratio=True),
        dict(type='RandomCrop', crop_size=(48, 64)),
    ]
    found = compact(cfg)
    assert found['compared'] == 'outputs'
    assert found['metrics_compact'] == {}


def test_predictions_of_several_test_sets_are_all_dumped(seg_cfg, tmp_path):
    cfg = seg_cfg(custom_hooks=HOOKS)
    one, metric = cfg.test_dataloader.dataset, cfg.test_evaluator
    cfg.test_dataloader.dataset = dict(type='mmdet.ConcatDataset', datasets=[one, one])
    cfg.test_evaluator = dict(
        type='mmdet.MultiDatasetsEvaluator', metrics=[metric, metric], dataset_prefixes=['a', 'b']
    )
    Runner.from_cfg(cfg).train()
    cfg.dump(tmp_path / 'config.py')
    work_dir, out = Path(cfg.work_dir), tmp_path / 'out.pkl'
    command = [tmp_path / 'config.py', work_dir / 'compact_last.pth', '--work-dir', tmp_path / 'w']
    assert run('test.py', *command, '--out', out) == (0, '')
    assert len(pickle.loads(out.read_bytes())) == 8


def test_tta_reaches_every_data_set():
    leaves = [dict(type='A', pipeline=[1]), dict(type='B')]
    outer = ConfigDict(type='Concat', datasets=[dict(type='Repeat', dataset=leaves[0]), leaves[1]])
    cfg = Config(dict(model=dict(type='M'), tta_model=dict(type='T'), tta_pipeline=[2]))
    cfg.test_dataloader = dict(dataset=outer)
    load('test.py').use_tta(cfg)
    outer = cfg.test_dataloader.dataset
    assert cfg.model == dict(type='T', module=dict(type='M'))
    assert 'pipeline' not in outer
    assert outer.datasets[0].dataset.pipeline == outer.datasets[1].pipeline == [2]


@pytest.mark.parametrize('hook', ['DetVisualizationHook', 'VisualizationHook', 'Seg'])
def test_where_predictions_are_drawn(hook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = ConfigDict(
        default_hooks=dict(visualization=dict(type=hook)), visualizer=dict(type='Visualizer')
    )
    args = Namespace(show_dir='drawn', show=False, wait_time=0, config='config.py')
    load('test.py').draw_predictions(cfg, args)
    found = cfg.default_hooks.visualization
    folder = str(tmp_path / 'drawn')
    assert Path(folder).is_dir()
    if hook == 'VisualizationHook':  # mmpretrain's
        assert (found.enable, found.interval, found.out_dir) == (True, 1, folder)
        return
    assert found.draw and cfg.visualizer.save_dir == folder
    assert found.get('test_out_dir') == (folder if hook.startswith('Det') else None)
