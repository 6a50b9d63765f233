"""Configs in every form that OpenMMLab has, through real, short Runners and the real tools."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from PIL import Image

import mmexpand
from mmexpand.mm import ContractHook, ExpandHook
from mmexpand.mm.compact_config import make_compact_config
from mmexpand.mm.datasets import check_datasets
from mmexpand.mm.models import (
    build_compact_model,
    build_expanded_model,
    configured_expansions,
    input_channels,
)
from mmexpand.surgery import named_units
from tests.conftest import ONEDL
from tests.tools_in_process import TOOLS, run

ENCODER = ('0.0.convs.0', '1.1.convs.0', '1.1.convs.1')
UNITS = [f'backbone.encoder.{name}.conv' for name in ENCODER]

PURE_BASE = """
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.optim import PolyLR
from mmengine.runner import IterBasedTrainLoop, TestLoop, ValLoop
from mmengine.visualization import LocalVisBackend
from mmseg.datasets import CityscapesDataset, LoadAnnotations, PackSegInputs
from mmseg.engine import SegVisualizationHook
from mmseg.evaluation import IoUMetric
from mmseg.models import CrossEntropyLoss, EncoderDecoder, FCNHead, SegDataPreProcessor, UNet
from mmseg.models.backbones.unet import InterpConv
from mmseg.visualization import SegLocalVisualizer
import torch.nn as nn
from torch.optim import SGD

default_scope = None
norm_cfg = dict(type=nn.BatchNorm2d)
model = dict(
    type=EncoderDecoder,
    data_preprocessor=dict(
        type=SegDataPreProcessor, mean=[127.5] * 3, std=[127.5] * 3, size=(32, 48)
    ),
    backbone=dict(
        type=UNet,
        base_channels=4,
        num_stages=2,
        strides=(1, 1),
        enc_num_convs=(1, 2),
        dec_num_convs=(1,),
        downsamples=(True,),
        enc_dilations=(1, 1),
        dec_dilations=(1,),
        norm_cfg=norm_cfg,
        upsample_cfg=dict(type=InterpConv),
    ),
    decode_head=dict(
        type=FCNHead,
        in_channels=4,
        in_index=1,
        channels=4,
        num_convs=1,
        num_classes=19,
        dropout_ratio=0,
        norm_cfg=norm_cfg,
        loss_decode=dict(type=CrossEntropyLoss, avg_non_ignore=True),
    ),
    test_cfg=dict(mode='whole'),
)
dataset = dict(
    type=CityscapesDataset,
    data_root='DATA_ROOT',
    data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
    pipeline=[dict(type=LoadImageFromFile), dict(type=LoadAnnotations), dict(type=PackSegInputs)],
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    dataset=dataset,
    sampler=dict(type=InfiniteSampler, shuffle=False),
)
val_dataloader = dict(
    batch_size=2,
    num_workers=0,
    dataset=dataset,
    sampler=dict(type=DefaultSampler, shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = dict(type=IoUMetric, iou_metrics=['mIoU'])
test_evaluator = val_evaluator
train_cfg = dict(type=IterBasedTrainLoop, max_iters=2, val_interval=2)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
optim_wrapper = dict(optimizer=dict(type=SGD, lr=0.01, momentum=0.9))
param_scheduler = [dict(type=PolyLR, power=0.9, end=8, by_epoch=False)]
default_hooks = dict(
    checkpoint=dict(type=CheckpointHook, interval=2, by_epoch=False),
    logger=dict(type=LoggerHook, interval=1, log_metric_by_epoch=False),
    visualization=dict(type=SegVisualizationHook, interval=1),
)
visualizer = dict(
    type=SegLocalVisualizer, name='visualizer', vis_backends=[dict(type=LocalVisBackend)]
)
log_processor = dict(by_epoch=False)
"""

PURE = """
from mmengine.config import read_base

with read_base():
    from .base import *

from mmexpand.mm import ContractHook, ExpandHook

custom_hooks = [
    dict(type=ExpandHook, include='backbone.encoder', method='cl', rate=2),
    dict(type=ContractHook),
]
"""


@pytest.fixture(scope='module')
def pure(tmp_path_factory, street):
    """A pure-Python config, and the work dir of a training with it."""
    root = tmp_path_factory.mktemp('pure')
    (root / 'base.py').write_text(PURE_BASE.replace('DATA_ROOT', str(street)))
    config = root / 'pure.py'
    config.write_text(PURE)
    assert run('train.py', config, '--work-dir', root / 'work_dir') == (0, '')
    return config, root / 'work_dir'


def test_pure_python_config_trains_and_loads_in_stock_mmseg(pure):
    _, work_dir = pure
    text = (work_dir / 'compact_config.py').read_text()
    assert "type='mmseg.models.UNet'" in text
    assert 'xpand' not in text.replace(str(work_dir), '')
    assert 'read_base' not in text
    script = f"""
import sys
sys.modules['mmexpand'] = None
import torch
from mmseg.apis import init_model
model = init_model(r'{work_dir}/compact_config.py', device='cpu')
weights = torch.load(r'{work_dir}/compact_last.pth', weights_only=True)['state_dict']
print(model.load_state_dict(weights, strict=True))
"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert 'All keys matched' in done.stdout, done.stderr


def test_pure_python_config_in_the_other_tools(pure, street, tmp_path, capsys):
    config, work_dir = pure
    checkpoint = work_dir / 'iter_2.pth'
    assert run('plan.py', config, '--shape', 32, 48) == (0, '')
    assert UNITS[0] in capsys.readouterr().out

    for shape in ([], ['--shape', 32, 48]):
        assert run('contract.py', config, checkpoint, '--work-dir', tmp_path, *shape) == (0, '')
        ours = torch.load(tmp_path / 'compact_iter_2.pth', weights_only=True)['state_dict']
        hooked = torch.load(work_dir / 'compact_last.pth', weights_only=True)['state_dict']
        assert all(torch.equal(ours[name], hooked[name]) for name in hooked)

    image = next(street.glob('leftImg8bit/train/town/*.png'))
    onnx = tmp_path / 'net.onnx'
    assert run('export_onnx.py', config, checkpoint, '--out', onnx, '--image', image) == (0, '')
    assert onnx.stat().st_size > 0

    pictures = tmp_path / 'pictures'
    assert run('analysis_tools/browse_results.py', config, checkpoint, '--out-dir', pictures) == (
        0,
        '',
    )
    assert len(list(pictures.glob('*.png'))) == 4


def test_pure_python_config_draws(pure, tmp_path):
    # In a process of its own: mmengine makes one visualizer for each.
    config, work_dir = pure
    command = [sys.executable, TOOLS / 'test.py', config, work_dir / 'iter_2.pth']
    command += ['--work-dir', tmp_path / 'test', '--show-dir', tmp_path / 'drawn']
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob('drawn/**/*.png'))


def test_pure_python_config_resumes(pure, tmp_path):
    config, work_dir = pure
    arguments = ('--resume', work_dir / 'iter_2.pth', '--cfg-options', 'train_cfg.max_iters=4')
    assert run('train.py', config, '--work-dir', tmp_path, *arguments) == (0, '')
    assert (tmp_path / 'iter_4.pth').exists()


def test_classes_in_a_config_that_was_made_in_python(seg_cfg):
    cfg = seg_cfg()
    hooks = [
        dict(type=ExpandHook, method='cl', include='backbone.encoder', rate=2),
        dict(type=ContractHook),
    ]
    cfg.custom_hooks = hooks
    cfg.model.backbone.norm_cfg = dict(type=torch.nn.BatchNorm2d)
    assert list(named_units(build_expanded_model(cfg))) == UNITS
    compact = make_compact_config(cfg)
    assert 'custom_hooks' not in compact
    assert compact.model.backbone.norm_cfg.type == 'torch.nn.modules.batchnorm.BatchNorm2d'
    exec(compile(compact.pretty_text, 'compact_config.py', 'exec'), {})
    build_compact_model(compact)


def test_what_no_file_can_hold_is_named(seg_cfg):
    cfg = seg_cfg()
    cfg.train_dataloader.collate_fn = dict(type=lambda batch: batch)
    with pytest.raises(TypeError, match=r'train_dataloader\.collate_fn\.type is <function'):
        make_compact_config(cfg)
    cfg.train_dataloader.collate_fn = dict(type='pseudo_collate', table=np.arange(3))
    assert make_compact_config(cfg).train_dataloader.collate_fn.table == [0, 1, 2]


def test_scoped_strings(seg_cfg, street, tmp_path):
    cfg = seg_cfg()
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.pipeline = [
            dict(type='mmengine.LoadImageFromFile'),
            dict(type='mmengine.LoadAnnotations', with_bbox=False, with_label=False, with_seg=True),
            dict(type='mmseg.PackSegInputs'),
        ]
    cfg.custom_hooks[0].type = 'mmdet.ExpandHook'
    cfg.custom_hooks[1].type = 'mmengine.ContractHook'
    config = tmp_path / 'scoped.py'
    cfg.dump(config)
    assert run('train.py', config) == (0, '')
    work_dir = Path(cfg.work_dir)
    assert 'xpand' not in (work_dir / 'compact_config.py').read_text().replace(str(work_dir), '')
    image = next(street.glob('leftImg8bit/train/town/*.png'))
    onnx = tmp_path / 'net.onnx'
    checkpoint = work_dir / 'compact_last.pth'
    assert run('export_onnx.py', config, checkpoint, '--out', onnx, '--image', image) == (0, '')
    assert onnx.exists()


def test_hooks_in_default_hooks(seg_cfg, tmp_path):
    cfg = seg_cfg()
    expand, contract = cfg.pop('custom_hooks')
    cfg.default_hooks.expand, cfg.default_hooks.contract = expand, contract
    assert [expansion.rate for _, expansion in configured_expansions(cfg)] == [2]
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert list(named_units(runner.model)) == UNITS
    compact = Config.fromfile(f'{cfg.work_dir}/compact_config.py')
    assert sorted(compact.default_hooks) == ['checkpoint', 'logger']
    weights = torch.load(f'{cfg.work_dir}/compact_last.pth', weights_only=True)['state_dict']
    build_compact_model(compact).load_state_dict(weights, strict=True)


def test_a_runner_from_keyword_arguments(seg_cfg):
    cfg = seg_cfg()
    cfg.custom_hooks[0].init = 'default'  # 'auto' preserves where nothing can build again.
    keys = ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'default_hooks')
    keys += ('custom_hooks', 'val_dataloader', 'val_cfg', 'val_evaluator', 'log_processor')
    keys += ('default_scope', 'model', 'randomness')
    arguments = {key: cfg[key] for key in keys}
    runner = Runner(work_dir=cfg.work_dir + '2', experiment_name='keywords', **arguments)
    runner.train()
    assert list(named_units(runner.model)) == UNITS
    held = [p for group in runner.optim_wrapper.param_groups for p in group['params']]
    assert set(held) == set(runner.model.parameters())
    assert len(held) == len(set(held))

    from_config = Runner.from_cfg(cfg)
    from_config.train()
    expected = from_config.model.state_dict()
    for name, value in runner.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    compact = mmexpand.contract(runner.model).state_dict()
    written = torch.load(f'{runner.work_dir}/compact_last.pth', weights_only=True)['state_dict']
    assert all(torch.equal(written[name], value) for name, value in compact.items())
    assert not Path(runner.work_dir, 'compact_config.py').exists()


@pytest.mark.parametrize(
    'channels',
    [1, pytest.param(4, marks=pytest.mark.skipif(ONEDL, reason='its preprocessor takes 1 or 3'))],
)
def test_images_with_other_channels_than_three(seg_cfg, tmp_path, channels, capsys):
    cfg = seg_cfg()
    cfg.model.data_preprocessor.update(mean=[127.5] * channels, std=[127.5] * channels)
    cfg.model.backbone.in_channels = channels
    model = build_expanded_model(cfg)
    assert input_channels(model) == channels
    config, checkpoint = tmp_path / 'channels.py', tmp_path / 'expanded.pth'
    cfg.dump(config)
    assert run('plan.py', config, '--shape', 32, 48) == (0, '')
    assert f'at 1x{channels}x32x48' in capsys.readouterr().out
    torch.save(model.state_dict(), checkpoint)
    arguments = ('--work-dir', tmp_path, '--shape', 32, 48)
    assert run('contract.py', config, checkpoint, *arguments) == (0, '')
    compact = torch.load(tmp_path / 'compact_expanded.pth', weights_only=True)['state_dict']
    assert compact[f'{UNITS[0]}.weight'].shape[1] == channels


def test_one_mean_for_three_channels(seg_cfg):
    cfg = seg_cfg()
    cfg.model.data_preprocessor.update(mean=[127.5], std=[127.5])
    assert input_channels(build_compact_model(cfg)) == 3


def loader(**dataset):
    return Config(dict(train_dataloader=dict(dataset=dict(type='CityscapesDataset', **dataset))))


@pytest.mark.parametrize(
    'dataset',
    [
        dict(data_root='s3://bucket/voc', ann_file='train.txt', data_prefix=dict(img='img')),
        dict(
            data_root='data/voc',
            ann_file='train.txt',
            backend_args=dict(backend='petrel', path_mapping={'data/': 's3://bucket/'}),
        ),
        dict(data_root='/none', data_prefix=dict(img_path='s3://bucket/img')),
        dict(data_root='/none', file_client_args=dict(backend='memcached')),
        dict(data_root='/none', download=True),
    ],
)
def test_data_that_is_not_on_this_disk_is_left_alone(dataset, request):
    if request.node.callspec.indices['dataset'] == 2:
        # The root itself is local here, and missing.
        with pytest.raises(FileNotFoundError, match='data_root'):
            check_datasets(loader(**dataset), ('train',))
        dataset = dict(dataset, data_root='')
    check_datasets(loader(**dataset), ('train',))


def test_data_prefix_as_a_string(tmp_path):
    (tmp_path / 'img').mkdir()
    check_datasets(loader(data_root=str(tmp_path), data_prefix='img'), ('train',))
    with pytest.raises(FileNotFoundError, match=r'data_prefix not found.*/imgs'):
        check_datasets(loader(data_root=str(tmp_path), data_prefix='imgs'), ('train',))


@DATASETS.register_module()
class FetchedStreet(BaseDataset):
    """Makes its images where they are missing, as mmpretrain's CIFAR10 does."""

    METAINFO = dict(classes=[str(index) for index in range(19)], palette=[[0, 0, 0]] * 19)

    def __init__(self, download: bool = True, **others):
        self.download = download
        super().__init__(**others)

    def load_data_list(self):
        root = Path(self.data_root)
        if self.download:
            root.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (48, 32)).save(root / 'image.png')
            Image.new('L', (48, 32)).save(root / 'mask.png')
        info = dict(img_path=f'{root}/image.png', seg_map_path=f'{root}/mask.png')
        return [dict(info, seg_fields=[], reduce_zero_label=False)] * 2


def test_a_data_set_that_downloads_itself(seg_cfg, tmp_path):
    cfg = seg_cfg()
    root = tmp_path / 'fetched'
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset.update(type='mmengine.FetchedStreet', data_root=str(root))
        dataset.pop('data_prefix')
    refused = cfg.copy()
    refused.train_dataloader.dataset.download = False
    with pytest.raises(FileNotFoundError, match='data_root not found'):
        check_datasets(refused, ('train',))
    del cfg.train_dataloader.dataset['download']
    config = tmp_path / 'fetched.py'
    cfg.dump(config)
    assert run('train.py', config) == (0, '')
    assert (root / 'image.png').exists()
    assert Path(cfg.work_dir, 'compact_last.pth').exists()
