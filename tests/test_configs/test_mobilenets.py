"""MobileNetV2 in a detector and a segmentor, expanded as the paper does."""

import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hub import get_config

from mmexpand.mm.dry_run_training import dry_run_training
from mmexpand.mm.models import build_expanded_model
from mmexpand.surgery import named_units
from tests.test_models.test_yolo_lite_configs import write_voc

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools/demo'))
from draw_cityscapes import draw_cityscapes

ROOT = Path(__file__).parents[2]

SSDLITE = ROOT / 'configs/ssdlite/ssdlite_mobilenetv2-scratch_expand-cl-r4_8xb24-600e_voc0712.py'
SSDLITE_COMPACT = SSDLITE.with_name(SSDLITE.name.replace('_expand-cl-r4', ''))
FCN = ROOT / 'configs/mobilenet_v2/mobilenet-v2-d8_expand-cl-r4_fcn_4xb2-80k_cityscapes-512x1024.py'
FCN_COMPACT = 'mmseg::mobilenet_v2/mobilenet-v2-d8_fcn_4xb2-80k_cityscapes-512x1024.py'


def without_download(cfg):
    cfg.model.pretrained = None
    if cfg.default_scope == 'mmdet':
        del cfg.model.pretrained
    return cfg


@pytest.mark.parametrize('path', [SSDLITE, FCN], ids=lambda path: path.parent.name)
def test_what_is_expanded(path):
    """All 3x3 convolutions of the backbone but those of blocks that add their input."""
    cfg = without_download(Config.fromfile(path))
    units = named_units(build_expanded_model(cfg))
    # The stem, and the first block of every one of seven stages; the others are residual.
    assert len(units) == 8
    assert [name.split('.')[:3] for name in units] == [
        ['backbone', 'conv1', 'conv'],
        *(['backbone', f'layer{stage}', '0'] for stage in range(1, 8)),
    ]
    stem, *depthwise = units.values()
    assert stem.groups == 1
    assert all(unit.groups == unit.in_channels > 1 for unit in depthwise)
    assert {unit.kernel_size for unit in units.values()} == {(3, 3)}
    assert {len(unit.factor_shapes) for unit in units.values()} == {3}


def test_twins_differ_in_our_hooks_only():
    for path, compact in (
        (SSDLITE, Config.fromfile(SSDLITE_COMPACT)),
        (FCN, get_config(FCN_COMPACT)),
    ):
        twin = Config.fromfile(path)
        assert [hook.type for hook in twin.custom_hooks[-2:]] == ['ExpandHook', 'ContractHook']
        assert twin.custom_hooks[:-2] == compact.pop('custom_hooks', [])
        ours = {k: v for k, v in twin.to_dict().items() if not k.startswith('custom_')}
        assert unscoped(ours) == unscoped(compact.to_dict())


def unscoped(node):
    if isinstance(node, dict):
        return {key: unscoped(value) for key, value in node.items() if key != '_scope_'}
    return [unscoped(value) for value in node] if isinstance(node, (list, tuple)) else node


def test_ssdlite_trains_and_contracts(tmp_path):
    boxes = [(10, 10, 60, 50), (30, 20, 90, 70), (80, 5, 119, 79)]
    write_voc(tmp_path, dict.fromkeys('abcd', boxes), ('cat', 'dog', 'person'))
    cfg = Config.fromfile(SSDLITE)
    train = cfg.train_dataloader
    for part in train.dataset.dataset.datasets:
        part.ann_file = 'VOC2007/ImageSets/Main/trainval.txt'
        part.data_prefix.sub_data_root = 'VOC2007/'
    for dataset in (*train.dataset.dataset.datasets, cfg.val_dataloader.dataset):
        dataset.data_root = f'{tmp_path}/'
    assert 0 < dry_run_training(quick(cfg)).loss < 100


def test_fcn_trains_and_contracts(tmp_path):
    draw_cityscapes(tmp_path / 'cityscapes', num_train=4, num_val=2, size=(100, 70))
    cfg = without_download(Config.fromfile(FCN))
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.train_dataloader.dataset.pipeline[2:4] = [dict(type='Resize', scale=(64, 64))]
    cfg.val_dataloader.dataset.pipeline[1].scale = (64, 64)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = str(tmp_path / 'cityscapes')
    assert 0 < dry_run_training(quick(cfg)).loss < 100


def quick(cfg):
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    cfg.train_dataloader.batch_size = 2
    cfg.test_dataloader = cfg.val_dataloader
    return cfg
