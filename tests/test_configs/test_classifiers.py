"""The paper's classifiers on ImageNet, which are mmpretrain's and timm's."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from torch import nn

from mmexpand.mm.dry_run_training import dry_run_training
from mmexpand.mm.models import build_compact_model, build_expanded_model
from mmexpand.surgery import named_units
from tests.tools_in_process import run

CONFIGS = Path(__file__).parents[2] / 'configs'
MOBILENET_V1 = CONFIGS / 'mobilenet_v1/mobilenet-v1_expand-cl-r4_8xb32-90e_in1k.py'
MOBILENET = CONFIGS / 'mobilenet_v2/mobilenet-v2_expand-cl-r4_8xb32-90e_in1k.py'
SHUFFLENET = CONFIGS / 'shufflenet_v2/shufflenet-v2-0.5x_expand-cl-r4_16xb64_in1k.py'
EXPANDED = [MOBILENET_V1, MOBILENET, SHUFFLENET]


@pytest.mark.parametrize('path', EXPANDED, ids=lambda path: path.stem)
def test_without_mmpretrain_it_is_asked_for(path, monkeypatch):
    monkeypatch.setattr('mmengine.config.config.is_installed', lambda name: name != 'mmpretrain')
    status, words = run('plan.py', path)
    assert status == 1
    assert 'mmpretrain is not installed, please install mmpretrain' in words


def test_mobilenet_v1_is_expanded_at_all_3x3():
    cfg = Config.fromfile(MOBILENET_V1)
    # The authors' 4.2 million.
    assert sum(p.numel() for p in build_compact_model(cfg).parameters()) == 4_231_976
    stem, *depthwise = named_units(build_expanded_model(cfg)).values()
    assert (stem.groups, stem.kernel_size) == (1, (3, 3))
    assert len(depthwise) == 13
    assert all(unit.groups == unit.in_channels > 1 for unit in depthwise)


def test_mobilenet_v2_is_expanded_outside_residual_blocks():
    units = named_units(build_expanded_model(Config.fromfile(MOBILENET)))
    # The stem, and the first block of every one of seven stages; the others are residual.
    assert [name.split('.')[1:3] for name in units] == [
        ['conv1', 'conv'],
        *([f'layer{stage}', '0'] for stage in range(1, 8)),
    ]
    assert {unit.kernel_size for unit in units.values()} == {(3, 3)}


def test_shufflenet_is_expanded_at_all_3x3():
    model = build_expanded_model(Config.fromfile(SHUFFLENET))
    units = named_units(model)
    # The stem, one in each of 16 blocks, and one more where a block reduces the size.
    assert len(units) == 1 + 16 + 3
    inside = {module for unit in units.values() for module in unit.modules()}
    left = {m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d) and m not in inside}
    assert left == {(1, 1)}
    assert model.backbone.layers[0][0].branch2[0].conv.out_channels == 24  # 48 of 116 at 1x.


@pytest.mark.parametrize('path', EXPANDED, ids=lambda path: path.stem)
def test_twins_differ_in_our_hooks_only(path):
    twin = Config.fromfile(path).to_dict()
    compact = Config.fromfile(path.with_name(path.name.replace('_expand-cl-r4', ''))).to_dict()
    assert [hook['type'] for hook in twin.pop('custom_hooks')] == ['ExpandHook', 'ContractHook']
    del twin['custom_imports']
    assert twin == compact


@pytest.mark.parametrize('path', EXPANDED, ids=lambda path: path.stem)
def test_it_trains_and_contracts(path, tmp_path):
    rng = np.random.default_rng(0)
    for name in ('cat', 'dog'):
        (tmp_path / name).mkdir()
        for index in range(4):
            image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / name / f'{index}.png'), image)
    cfg = Config.fromfile(path)
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
        loader.dataset = dict(type='CustomDataset', data_root=str(tmp_path), pipeline=pipeline)
    assert 0 < dry_run_training(cfg).loss < 100
