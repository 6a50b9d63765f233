"""A small segmentation run that every test of the framework layer starts from."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image

from mmexpand.stack import installed_version
from tests.quick_runs import freeze_imports

os.environ.setdefault('CUDA_VISIBLE_DEVICES', '-1')
settings.register_profile('few', max_examples=40, deadline=None, derandomize=True)
settings.register_profile('soak', max_examples=2000, deadline=None)
settings.load_profile('few')
ONEDL = installed_version('onedl-mmengine') is not None
"""True if the stack is the maintained forks."""
_runs = itertools.count()
SEGMENTOR = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[127.5] * 3, std=[127.5] * 3, size=(32, 48)
    ),
    backbone=dict(
        type='UNet',
        base_channels=4,
        num_stages=2,
        strides=(1, 1),
        enc_num_convs=(1, 2),
        dec_num_convs=(1,),
        downsamples=(True,),
        enc_dilations=(1, 1),
        dec_dilations=(1,),
        norm_cfg=dict(type='BN'),
    ),
    decode_head=dict(
        type='FCNHead',
        in_channels=4,
        in_index=1,
        channels=4,
        num_convs=1,
        num_classes=19,
        dropout_ratio=0,
        norm_cfg=dict(type='BN'),
        loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True),
    ),
    test_cfg=dict(mode='whole'),
)


LONGEST = (
    *('test_docs', 'test_tools', 'test_networks', 'test_hooks', 'test_packaging', 'test_soak'),
    *('test_lost_hooks', 'test_weight_sets', 'test_distributed'),
)


def pytest_collection_modifyitems(items):
    """The longest files first: one that is begun last is waited for by all other processes."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish():
    """All test files are imported now."""
    freeze_imports()


@pytest.fixture(autouse=True)
def no_default_scope():
    """A Runner leaves its default scope behind, and the next test would look for types in it."""
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture(scope='session')
def street(tmp_path_factory):
    """Where ``draw_street`` has drawn."""
    return draw_street(tmp_path_factory.mktemp('street'))


def draw_street(root: Path) -> Path:
    """Four images in Cityscapes' layout: a bright thing (car) on a dark ground (road)."""
    rng = np.random.default_rng(0)
    for index in range(4):
        image = rng.integers(0, 60, (32, 48, 3), dtype=np.uint8)
        label = np.zeros((32, 48), np.uint8)
        x, y = rng.integers(0, 20, 2)
        image[y : y + 12, x : x + 20] += 150
        label[y : y + 12, x : x + 20] = 13
        for folder, array, suffix in (
            ('leftImg8bit', image, 'leftImg8bit'),
            ('gtFine', label, 'gtFine_labelTrainIds'),
        ):
            path = root / folder / 'train' / 'town'
            path.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path / f'town_{index}_{suffix}.png')
    return root


def small_config(street, directory, **changes) -> Config:
    """A config that trains SEGMENTOR for a few iterations, with ``changes`` merged into it."""
    dataset = dict(
        type='CityscapesDataset',
        data_root=str(street),
        data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
    )
    loader = dict(batch_size=2, num_workers=0, dataset=dataset)
    val = dict(loader, sampler=dict(type='DefaultSampler', shuffle=False))
    evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
    cfg = Config(
        dict(
            default_scope='mmseg',
            custom_imports=dict(imports=['mmexpand'], allow_failed_imports=False),
            model=SEGMENTOR,
            train_dataloader=dict(loader, sampler=dict(type='InfiniteSampler', shuffle=False)),
            val_dataloader=val,
            test_dataloader=val,
            val_evaluator=evaluator,
            test_evaluator=evaluator,
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=4, val_interval=2),
            val_cfg=dict(type='ValLoop'),
            test_cfg=dict(type='TestLoop'),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
            param_scheduler=[dict(type='PolyLR', power=0.9, end=8, by_epoch=False)],
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False),
                logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
            ),
            custom_hooks=[
                dict(type='ExpandHook', method='cl', include='backbone.encoder', rate=2),
                dict(type='ContractHook'),
            ],
            log_processor=dict(by_epoch=False),
            randomness=dict(seed=0),
            work_dir=str(directory),
            experiment_name=f'test_{next(_runs)}',
            launcher='none',
        )
    )
    cfg.merge_from_dict(changes)
    return cfg


@pytest.fixture
def seg_cfg(street, tmp_path):
    """Makes a ``small_config``; keyword arguments are merged into it."""

    def make(**changes) -> Config:
        return small_config(street, tmp_path / 'work_dir', **changes)

    return make
