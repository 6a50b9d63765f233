"""Predictions by the frameworks' own inferencers, from what a training leaves."""

from pathlib import Path

import numpy as np
import pytest
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.apis import MMSegInferencer
from PIL import Image

from mmexpand.mm.compact_config import make_compact_config
from mmexpand.surgery.checkpoint import save_checkpoint

CONFIGS = Path(__file__).parents[2] / 'configs'


@pytest.fixture
def images(tmp_path):
    """A folder of two photographs of noise."""
    folder = tmp_path / 'images'
    folder.mkdir()
    for name in ('a', 'b'):
        pixels = np.random.default_rng(len(name)).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{name}.png')
    return folder


def test_a_segmentor(seg_cfg, images):
    visualizer = dict(type='SegLocalVisualizer', name='visualizer')
    cfg = seg_cfg(visualizer=visualizer, **{'train_cfg.max_iters': 2})
    cfg.custom_hooks[0].update(method='repvgg')
    Runner.from_cfg(cfg).train()
    work_dir = Path(cfg.work_dir)
    inferencer = MMSegInferencer(
        str(work_dir / 'compact_config.py'), str(work_dir / 'compact_last.pth'), device='cpu'
    )
    found = inferencer(str(images), return_datasamples=True, out_dir=str(work_dir / 'out'))
    assert len(found) == 2
    assert found[0].pred_sem_seg.data.shape[-2:] == (48, 64)
    assert len(list((work_dir / 'out').rglob('*.png'))) > 0
    assert len(inferencer.visualizer.dataset_meta['classes']) == 19


def test_a_detector(images, tmp_path):
    path = CONFIGS / 'demo/yolo-lite_2xb8-400iters_drawn-voc-160x160.py'
    cfg = make_compact_config(Config.fromfile(path))
    cfg.dump(tmp_path / 'compact_config.py')
    model = Runner.from_cfg(
        Config(dict(model=cfg.model, work_dir=str(tmp_path), default_scope='mmdet'))
    ).model
    meta = dict(dataset_meta=dict(classes=[str(i) for i in range(20)], palette=[(0, 0, 0)] * 20))
    save_checkpoint(dict(state_dict=model.state_dict(), meta=meta), tmp_path / 'compact_last.pth')
    inferencer = DetInferencer(
        str(tmp_path / 'compact_config.py'), str(tmp_path / 'compact_last.pth'), device='cpu'
    )
    found = inferencer(str(images), out_dir=str(tmp_path / 'out'))
    assert len(found['predictions']) == 2
    assert len(list((tmp_path / 'out/vis').iterdir())) == 2
    assert {*found['predictions'][0]} >= {'labels', 'scores', 'bboxes'}
