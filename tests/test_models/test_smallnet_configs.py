"""SmallNet's configs: what their names say, and that each trains and contracts."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

import mmexpand.mm  # noqa: F401
from mmexpand.mm.models import build_compact_model, build_expanded_model
from mmexpand.surgery import named_units
from tests.test_study.conftest import write_images

NAME = re.compile(r'smallnet-k(\d)(?:_expand-([a-z-]+)-r(\d))?_1xb128-150e_cifar(10|100)')
CONFIGS = [  # Those with a teacher, or a start of their own, are tested elsewhere.
    path
    for path in sorted((Path(__file__).parents[2] / 'configs/smallnet').glob('*.py'))
    if NAME.fullmatch(path.stem)
]
EXPANDED = [path for path in CONFIGS if 'expand' in path.name]
SHORT = {
    'model.channels': (4, 6),
    'model.hidden': 5,
    'model.image_size': 8,
    'model.num_classes': 2,
    'train_cfg.max_epochs': 1,
    'train_cfg.val_interval': 1,
}


def named(path):
    """Return the kernel size, method, rate (or None) and classes of a config's name."""
    kernel, method, rate, classes = NAME.fullmatch(path.stem).groups()
    return int(kernel), method and method.replace('-', '+'), rate and int(rate), int(classes)


def test_all_kernels_are_there():
    assert {named(path) for path in CONFIGS} == {
        (kernel, method, method and 4, classes)
        for kernel in (3, 5, 7, 9)
        for method in (None, 'cl', 'ck', 'fc', 'cl+fc', 'ck+fc')
        for classes in (10, 100)
        if (method != 'ck' or kernel > 3)
        and (kernel == 7 or ('fc' not in (method or '') and classes == 10))
    }


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_network_is_what_the_name_says(path):
    cfg = Config.fromfile(path)
    kernel, method, rate, classes = named(path)
    model = build_compact_model(cfg)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [conv.kernel_size for conv in convs] == [(kernel, kernel)] * 3
    assert model.classifier[-1].out_features == classes
    assert cfg.test_dataloader.dataset.ann_file == f'cifar{classes}.zip'
    assert cfg.test_dataloader.dataset.data_root == f'data/cifar{classes}/'
    if not method:
        return
    (hook, _) = cfg.custom_hooks
    assert (hook.method, hook.rate) == (method, rate)
    convolutions = [] if method == 'fc' else ['features.0', 'features.4', 'features.8']
    linear = ['classifier.0'] if 'fc' in method else []
    units = named_units(build_expanded_model(cfg))
    assert list(units) == convolutions + linear
    if method.startswith('ck'):
        assert all(len(units[name].factor_shapes) == (kernel - 1) // 2 for name in convolutions)


@pytest.mark.parametrize('path', EXPANDED, ids=lambda path: path.stem)
def test_it_trains_and_contracts(path, tmp_path):
    cfg = Config.fromfile(path)
    write_images(tmp_path / cfg.train_dataloader.dataset.ann_file)
    cfg.merge_from_dict(SHORT)
    cfg.work_dir = str(tmp_path / 'work_dir')
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].batch_size = 8
        cfg[f'{split}_dataloader'].dataset.update(data_root=str(tmp_path), val_images=8)
    Runner.from_cfg(cfg).train()
    report = torch.load(tmp_path / 'work_dir/compact_last.pth', weights_only=True)['meta']
    assert 0 < report['mmexpand']['max_error'] < 1e-4
