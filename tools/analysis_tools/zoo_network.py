"""Expand, contract and compare the smallest network of one family of mmdet's or mmseg's configs.

zoo.py runs it in a separate process.
"""

import copy
import json
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.testing import demo_mm_inputs, demo_track_inputs
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import mmexpand
from mmexpand import ExpandConfig
from mmexpand.analysis.footprint import tensors_in
from mmexpand.files import write_text
from mmexpand.mm.compact_config import dicts
from mmexpand.mm.compat import raw
from mmexpand.mm.contraction import contract_and_verify, verify_on_batch
from mmexpand.mm.models import build_compact_model, features, input_channels, tensor_outputs
from mmexpand.surgery.copying import copy_model
from mmexpand.surgery.train_mode import eval_mode

SMALL_FIRST = [
    'nano',
    'tiny',
    'slim',
    '-b0',
    'b0_',
    'mobilenet',
    'r18',
    'hr18',
    'w18',
    'stdc1',
    '-t_',
    '-t-',
    '_t_',
    '-s_',
    '_s_',
    's12',
    '400MF',
    'r50',
    'vit-s',
]
"""Parts of the names of small networks, the smallest first."""

TYPICAL = {
    'mmdet/dcn': 'faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py',
    'mmdet/dcnv2': 'faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py',
    'mmdet/gcnet': 'mask-rcnn_r50-gcb-r4-c3-c5_fpn_1x_coco.py',
}
"""Names of configs for families whose name is in no config's name."""

BUILDING = 'building and running stock'
"""The stage whose failures are the stock network's."""

SIDES = 64, 128, 256, 512, 640
"""Heights and widths to try a stock network on; some need large ones."""


class StockError(Exception):
    """The stock network cannot be built or run here."""


def families() -> list[str]:
    """Return all folders of configs of both packages: 'mmdet/atss', ..."""
    return [
        f'{package}/{folder.name}'
        for package in ('mmdet', 'mmseg')
        for folder in sorted(configs_of(package).iterdir())
        if folder.name != '_base_' and any(folder.glob('*.py'))
    ]


def configs_of(package: str) -> Path:
    """Return the folder of configs in an installed package."""
    return Path(import_module(package).__file__).parent / '.mim' / 'configs'


def candidates(family: str) -> list[str]:
    """Return a family's configs: first the ones with its name, the smallest network first."""
    package, _, name = family.partition('/')
    found = [path.name for path in (configs_of(package) / name).glob('*.py')]

    def rank(config: str) -> tuple:
        sizes = [i for i, word in enumerate(SMALL_FIRST) if word in config]
        named = _letters(name) in _letters(config)
        return config != TYPICAL.get(family), not named, min(sizes, default=99), len(config), config

    return sorted(found, key=rank)


def _letters(name: str) -> str:
    return ''.join(character for character in name.lower() if character.isalnum())


def usable_config(family: str, name: str) -> Config | None:
    """Return a config without downloads; None if it has no model."""
    package, _, folder = family.partition('/')
    cfg = Config.fromfile(configs_of(package) / folder / name)  # get_config does not find gn+ws.
    if 'model' not in cfg:
        return None
    _drop_downloads(cfg)
    _need_no_processes(cfg)
    _keep_few(cfg)
    return cfg


def _drop_downloads(cfg: Config) -> None:
    for node in dicts(raw(cfg)):
        if 'checkpoint' in str(node.get('init_cfg')):
            node['init_cfg'] = None
        for key in ('pretrained', 'teacher_ckpt'):
            if node.get(key):
                node[key] = False if node[key] is True else None  # timm's is a flag.


def _need_no_processes(cfg: Config) -> None:
    for node in dicts(raw(cfg)):
        if node.get('type') == 'MMSyncBN':
            node['type'] = (
                'BN'  # torch's SyncBN becomes BN too; mmcv's would require a process group.
            )


def _keep_few(cfg: Config) -> None:
    # A thousand proposals of random weights take minutes.
    for node in dicts(cfg.model):
        if 'max_per_img' in node:
            node['max_per_img'] = 20


def build_stock(cfg: Config) -> nn.Module:
    """Return the network with random weights, none of them zero or without effect."""
    torch.manual_seed(0)
    np.random.seed(0)
    model = build_compact_model(cfg)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def drawn_batch(model: nn.Module, cfg: Config, side: int) -> dict:
    """Return two drawn images with all annotations that a loss may require."""
    if cfg.default_scope == 'mmseg':
        return _segmentation_batch(input_channels(model), side)
    found = [node['num_classes'] for node in dicts(cfg.model) if 'num_classes' in node]
    classes = min(max(min(found, default=2), 2), 80)  # Drawn as bytes.
    shapes = [(input_channels(model), side, side)] * 2
    if 'Track' in str(cfg.model.get('data_preprocessor')):
        return demo_track_inputs(1, image_shapes=shapes[:1], with_mask=True)
    return demo_mm_inputs(2, shapes, num_classes=classes, with_mask=True, with_semantic=True)


def _segmentation_batch(channels: int, side: int) -> dict:
    shape = dict(img_shape=(side, side), ori_shape=(side, side), pad_shape=(side, side))
    samples = []
    for _ in range(2):
        labels = PixelData(data=torch.randint(0, 2, (1, side, side)))
        sample = SegDataSample(metainfo=shape, gt_sem_seg=labels)
        sample.gt_edge_map = PixelData(data=torch.randint(0, 2, (1, side, side)))
        samples.append(sample)
    images = torch.randint(0, 256, (2, channels, side, side), dtype=torch.uint8)
    return dict(inputs=list(images), data_samples=samples)


@torch.no_grad()
def smallest_batch(stock: nn.Module, cfg: Config) -> tuple[int, dict]:
    """Return the smallest batch that the stock network runs on, at least up to features."""
    errors = []
    for run in (tensor_outputs, features):
        for side in SIDES:
            batch = drawn_batch(stock, cfg, side)
            try:
                with eval_mode(stock):
                    outputs = run(stock, stock.data_preprocessor(copy.deepcopy(batch), False))
            except Exception as error:  # The network's own: of any kind.
                errors.append(error)
                continue
            if not all(output.isfinite().all() for output in tensors_in(outputs)):
                raise FloatingPointError('the outputs are not finite with random weights')
            return side, batch
    raise errors[len(SIDES) - 1]  # The whole network on large images.


def stock_network(family: str) -> tuple[str, nn.Module, int, dict]:
    """Return the config of a family, its network, and the side of a batch it runs on.

    The first of three configs that works is taken.

    Raises:
        StockError: with the message of the first config's error.
    """
    package, _, folder = family.partition('/')
    errors: list[str] = []
    for name in candidates(family):
        full_name = f'{package}::{folder}/{name}'
        try:
            cfg = usable_config(family, name)
            if cfg is not None:
                stock = build_stock(cfg)
                return full_name, stock, *smallest_batch(stock, cfg)
        except Exception as error:  # The network's own: of any kind.
            errors.append(f'{full_name}: {first_words(error)}')
        if len(errors) == 3:
            break
    raise StockError(errors[0] if errors else 'no config of this folder has a model')


def first_words(error: Exception) -> str:
    """Return the type of an error and the beginning of its message."""
    words = f'{type(error).__name__}: {" ".join(str(error).split())}'
    return words if len(words) <= 160 else words[:157] + '...'


def try_network(stock: nn.Module, batch: dict) -> dict[str, Any]:
    """Expand everything eligible, compare with stock, contract, compare with the expanded one."""
    expanded = copy_model(stock)
    plan = mmexpand.expand_(expanded, ExpandConfig('cl', rate=1, init='preserve'))
    say('comparing with stock')
    preserved, _ = verify_on_batch(expanded, stock, batch)
    say('contracting')
    result = contract_and_verify(expanded, batch)
    found = result.verification
    weights = result.compact.state_dict()
    changed = max(relative(value, weights[name]) for name, value in stock.state_dict().items())
    stock.load_state_dict(weights)
    return dict(
        layers=len(plan),
        params_before=plan.params_before,
        params_after=plan.params_after,
        skipped=Counter(layer.reason for layer in plan.skipped),
        compared=result.compared,
        error_expanded=preserved.max_error,
        error_contracted=found.max_error,
        error_weights=changed,
        verified_on=Counter(found.how.values()),
    )


def outcome(family: str) -> dict[str, Any]:
    """Return the result of a family: 'exact', 'failed', or 'stock' if the stock network fails."""
    try:
        name, stock, side, batch = stock_network(family)
    except StockError as error:
        return dict(status='stock', error=str(error))
    found = dict(config=name, side=side)
    say('expanding')
    try:
        return dict(**found, **try_network(stock, batch), status='exact')
    except Exception as error:  # Any error: the page names it.
        traceback.print_exc()
        return dict(**found, status='failed', error=first_words(error))


def relative(reference: Tensor, value: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest magnitude."""
    difference = (reference.double() - value.double()).abs().max()
    return float(difference / reference.double().abs().max().clamp_min(1e-12))


def say(stage: str) -> None:
    """Print the stage, which the caller reads if the process is killed."""
    print(f'stage: {stage}', flush=True)


def log_of(path: Path) -> Path:
    """Return the log of the process that writes a JSON."""
    return path.with_suffix('.log')


def main(family: str, path: Path, outcome: Callable[[str], dict[str, Any]] = outcome) -> None:
    """Write the result of a family."""
    with log_of(path).open('w') as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(configs_of(family.partition('/')[0]).parent)  # Configs refer to others from there.
    start = time.perf_counter()
    say(BUILDING)
    result = dict(family=family, **outcome(family))
    result['seconds'] = round(time.perf_counter() - start, 1)
    write_text(json.dumps(result, indent=2), path)
