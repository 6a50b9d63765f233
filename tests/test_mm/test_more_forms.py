"""More forms of configs: hooks, keyword arguments, places of data, ``sync_bn``."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import nn

import mmexpand
from mmexpand.mm.datasets import check_datasets
from mmexpand.mm.models import (
    build_compact_model,
    build_expanded_model,
    configured_expansions,
    input_channels,
)
from mmexpand.surgery import named_units
from mmexpand.surgery.checkpoint import load_checkpoint
from tests.processes import launch, run_workers

TOOLS = Path(__file__).parents[2] / 'tools'


def test_hooks_among_the_default_ones(seg_cfg):
    cfg = seg_cfg(custom_hooks=[])
    cfg.default_hooks.expand = dict(
        type='ExpandHook', method='cl', include='backbone.encoder', rate=2, compact_gradients=False
    )
    cfg.default_hooks.contract = dict(type='ContractHook')
    assert [expansion.rate for _, expansion in configured_expansions(cfg)] == [2]
    Runner.from_cfg(cfg).train()
    compact = Config.fromfile(f'{cfg.work_dir}/compact_config.py')
    assert set(compact.default_hooks) == {'checkpoint', 'logger'}
    trained = load_checkpoint(f'{cfg.work_dir}/compact_last.pth')['state_dict']
    assert list(build_compact_model(compact).state_dict()) == list(trained)


def keywords(cfg: Config) -> dict:
    """Arguments of a script for Runner(...); ``runner.cfg`` has none of them."""
    left_out = ('custom_imports', 'launcher')
    return {key: value for key, value in cfg.items() if key not in left_out}


def test_a_runner_from_keyword_arguments_with_an_optimizer(seg_cfg):
    cfg = seg_cfg()
    cfg.optim_wrapper.paramwise_cfg = dict(custom_keys={'backbone.encoder': dict(lr_mult=0.1)})
    arguments = keywords(cfg)
    built = Runner.from_cfg(cfg)
    optim_wrapper = built.build_optim_wrapper(arguments['optim_wrapper'])
    arguments.update(model=built.model, optim_wrapper=optim_wrapper)
    arguments['experiment_name'] += '_again'
    runner = Runner(**arguments)
    runner.train()
    assert len(named_units(runner.model)) == 3
    held = {p for group in runner.optim_wrapper.param_groups for p in group['params']}
    assert held >= set(runner.model.parameters())
    factors = set(named_units(runner.model)['backbone.encoder.0.0.convs.0.conv'].parameters())
    groups = runner.optim_wrapper.param_groups
    slow = {g['lr'] for g in groups if factors & set(g['params'])}
    fast = {
        g['lr'] for g in groups if set(runner.model.decode_head.parameters()) & set(g['params'])
    }
    assert max(slow) == pytest.approx(0.1 * min(fast))
    assert (Path(cfg.work_dir) / 'compact_last.pth').exists()
    assert not (Path(cfg.work_dir) / 'compact_config.py').exists()


def test_channels_where_nothing_is_normalised():
    model = nn.Sequential(nn.Conv2d(5, 2, 3), nn.Conv2d(2, 2, 3))
    assert input_channels(model) == 5
    mmexpand.expand_(model, method='cl')
    assert input_channels(model) == 5


class Downloading(BaseDataset):
    """As mmpretrain's CIFAR10: what is missing is downloaded."""

    def __init__(self, data_prefix='', download=True, **kwargs):
        super().__init__(data_prefix=dict(img_path=data_prefix), **kwargs)


def check(**dataset):
    check_datasets(Config(dict(train_dataloader=dict(dataset=dataset))), ('train',))


@pytest.mark.parametrize(
    'dataset',
    [
        dict(data_root='s3://bucket/voc', data_prefix=dict(img='JPEGImages')),
        dict(data_root='s3://bucket/voc', ann_file='train.txt'),
        dict(ann_file='https://host/train.json'),
        dict(
            data_root='data/nowhere/',
            backend_args=dict(backend='petrel', path_mapping={'data/': 's3://bucket/'}),
        ),
        dict(
            data_root='nowhere',
            pipeline=[dict(type='LoadImageFromFile', backend_args=dict(backend='petrel'))],
        ),
        dict(type=Downloading, data_root='nowhere', data_prefix='images'),
        dict(type='DownloadingByName', data_prefix='nowhere'),
    ],
)
def test_what_is_not_on_this_disk_is_left_to_the_data_set(dataset):
    DATASETS.register_module(name='DownloadingByName', module=Downloading, force=True)
    check(**{'type': 'BaseDataset', **dataset})


@pytest.mark.parametrize(
    ('dataset', 'words'),
    [
        (dict(type=Downloading, download=False, data_root='nowhere'), 'data_root not found'),
        (dict(data_root='nowhere', backend_args=dict(backend='local')), 'data_root not found'),
        (dict(data_root='nowhere', backend_args=None), 'data_root not found'),
        (dict(data_root='.', data_prefix='nowhere'), r'data_prefix not found.*nowhere'),
        (dict(data_prefix='nowhere'), r'data_prefix not found.*nowhere'),
    ],
)
def test_what_should_be_on_this_disk_is_looked_for(dataset, words):
    with pytest.raises(FileNotFoundError, match=words):
        check(**{'type': 'BaseDataset', **dataset})


def test_a_data_prefix_may_be_a_string(tmp_path):
    (tmp_path / 'images').mkdir()
    check(type='BaseDataset', data_root=str(tmp_path), data_prefix='images')


WATCHED = """
import gc, runpy, sys
import torch.distributed as dist
leave = dist.destroy_process_group
def watched():
    held = [o for o in gc.get_objects() if 'DistributedDataParallel' in str(type(o))]
    leave()
    print('left the group, held by', held)
dist.destroy_process_group = watched
runpy.run_path(sys.argv.pop(1), run_name='__main__')
"""


def train_distributed(cfg, folder, run=run_workers, script=()) -> str:
    """tools/train.py, or a script that is given it, in one process; returns what it said."""
    cfg.dump(folder / 'config.py')
    command = [*script, TOOLS / 'train.py', folder / 'config.py', '--launcher', 'pytorch']
    done = run(*command, processes=1)
    assert (Path(cfg.work_dir) / 'compact_last.pth').exists()
    return done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_sync_bn_at_the_top_level_without_a_gpu(seg_cfg, tmp_path):
    train_distributed(seg_cfg(sync_bn='torch'), tmp_path)


def test_the_process_group_is_left_before_the_process_ends(seg_cfg, tmp_path):
    """And nothing is left that holds it: gloo's threads would abort a process that ends first."""
    (tmp_path / 'watched.py').write_text(WATCHED)
    said = train_distributed(seg_cfg(), tmp_path, launch, [tmp_path / 'watched.py'])
    assert 'left the group, held by []' in said


def test_anomalous_params_are_those_that_the_loss_does_not_reach(seg_cfg, tmp_path):
    """Compact-size gradients would cut all factors off the graph that it looks at."""
    wrapper = dict(type='MMDistributedDataParallel', detect_anomalous_params=True)
    said = train_distributed(seg_cfg(model_wrapper_cfg=wrapper), tmp_path)
    assert 'is not in the computational graph' not in said
    assert 'as detect_anomalous_params requires' in said


def test_a_builder_expands_before_a_hook(seg_cfg):
    cfg = seg_cfg(custom_hooks=[dict(type='ExpandHook', method='cl', rate=2)])
    builder = dict(type='ExpandBackbone', method='bn', include='encoder')
    cfg.model.backbone = dict(builder, backbone=cfg.model.backbone)
    runner = Runner.from_cfg(cfg)
    runner.train()
    trained = {name: unit.method for name, unit in named_units(runner.model).items()}
    assert set(trained.values()) == {'bn', 'cl'}
    built = named_units(build_expanded_model(cfg))
    assert {name: unit.method for name, unit in built.items()} == trained
