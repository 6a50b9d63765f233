"""Draw the loss around a network's weights, along random directions: a line and a plane (Fig. 4).

Directions are filter-normalised (Li et al., 2018). The network is contracted, its norms are in eval
mode, and images have the test pipeline. Networks of the same shapes share images and directions.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.runner import Runner, set_random_seed
from mmengine.utils import track_iter_progress
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from mmexpand.analysis.landscape import draw, losses_at, random_direction
from mmexpand.deploy import load_compact_model
from mmexpand.errors import UserValueError
from mmexpand.files import save_figure, write_text
from mmexpand.mm.command_line import add_config_arguments, count, device, read_config, tool
from mmexpand.mm.compact_config import type_name
from mmexpand.mm.config_file import ConfigError
from mmexpand.mm.contraction import check_writable
from mmexpand.mm.datasets import check_datasets, guard_pipelines, innermost
from mmexpand.mm.ranks import describe
from mmexpand.surgery.checkpoint import load_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file path')
    parser.add_argument('checkpoint', help='checkpoint file, expanded or compact')
    parser.add_argument('--out-dir', required=True, help='for landscape.json and landscape.png')
    parser.add_argument(
        '--split',
        choices=['train', 'val', 'test'],
        default='train',
        help='split of the images (default: %(default)s)',
    )
    parser.add_argument(
        '--batches', type=count, default=10, help='number of batches (default: %(default)s)'
    )
    parser.add_argument(
        '--steps', type=count, default=10, help='steps to each side (default: %(default)s)'
    )
    parser.add_argument(
        '--span', type=float, default=1, help='largest step to each side (default: %(default)s)'
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='seed of directions and images (default: 0)'
    )
    parser.add_argument('--name', help='name in the picture (default: the checkpoint)')
    parser.add_argument(
        '--beside', nargs='+', default=[], metavar='JSON', help='earlier results to draw too'
    )
    parser.add_argument('--device', type=device, default='cpu', help='default: %(default)s')
    add_config_arguments(parser)
    args = parser.parse_args()
    if args.span <= 0:
        parser.error(f'--span must be above 0, got {args.span}')
    return args


def read_batches(cfg: Config, args: argparse.Namespace, model: nn.Module) -> list[dict]:
    """Return random batches of a split, preprocessed as in a test, with annotations."""
    loader = copy.deepcopy(cfg[f'{args.split}_dataloader'])
    steps = innermost(cfg.test_dataloader.dataset)[0].get('pipeline', [])
    datasets = innermost(loader.dataset)
    for dataset in datasets:
        # The loss requires annotations that are resized with the images, unlike those of a test.
        dataset.pipeline = sorted(steps, key=lambda s: not type_name(s).startswith('Load'))
    loader.dataset = dict(type='ConcatDataset', datasets=datasets) if datasets[1:] else datasets[0]
    loader.sampler = dict(type='DefaultSampler', shuffle=True)
    loader.update(num_workers=0, persistent_workers=False, prefetch_factor=None)
    built = Runner.build_dataloader(loader, seed=args.seed)
    guard_pipelines(built.dataset)
    with torch.no_grad():
        return [
            preprocess(model.data_preprocessor, part)
            for batch in islice(built, args.batches)
            for part in of_one_size(batch)
        ]


def of_one_size(batch: dict) -> list[dict]:
    """Yield a batch, or its images one by one if their sizes differ, as a test does."""
    if len({image.shape for image in batch['inputs']}) == 1:
        return [batch]
    return [
        {key: values[index : index + 1] for key, values in batch.items()}
        for index in range(len(batch['inputs']))
    ]


def preprocess(preprocessor: nn.Module, batch: dict) -> dict:
    """Preprocess as in a test, but pad annotations with the images."""
    data = preprocessor(batch, False)
    samples = data.get('data_samples') or ()
    if getattr(preprocessor, 'pad_mask', False):
        preprocessor.pad_gt_masks(samples)
    if getattr(preprocessor, 'pad_seg', False):
        preprocessor.pad_gt_sem_seg(samples)
    for sample in samples:
        padding = sample.get('img_padding_size')
        if padding and 'gt_sem_seg' in sample:
            truth = sample.gt_sem_seg.data
            truth = F.pad(truth, tuple(padding), value=preprocessor.seg_pad_val)
            sample.gt_sem_seg = type(sample.gt_sem_seg)(data=truth)
    return data


def loss_mode(model: nn.Module) -> nn.Module:
    """Set heads to training mode, whose outputs the loss takes.

    Norms and dropout stay in eval mode, so that the loss of an image does not depend on its batch.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, (_NormBase, _DropoutNd, nn.MultiheadAttention)) or (
            type(module).__name__ in ('DropPath', 'DropBlock')
        ):
            module.eval()
    return model


def make_loss(batches: list[dict], seed: int) -> Callable[[nn.Module], float]:
    """Return a function for the mean loss, with the same random samples on each call."""
    counts = [len(data['inputs']) for data in batches]

    def loss(model: nn.Module) -> float:
        set_random_seed(seed)
        try:
            losses = [model.parse_losses(model(**data, mode='loss'))[0] for data in batches]
        except Exception as error:
            raise ConfigError(
                f'{type(model).__name__} has no loss on the images of test_dataloader: '
                f'{describe(error)}; its pipeline must load the annotations that the loss requires '
                "(boxes and masks: dict(type='LoadAnnotations'))"
            ) from error
        return float(np.average([float(value) for value in losses], weights=counts))

    return loss


def survey(model: nn.Module, loss: Callable[[nn.Module], float], args: argparse.Namespace) -> dict:
    generator = torch.Generator().manual_seed(args.seed)
    directions = [random_direction(model, generator) for _ in range(2)]
    steps = [args.span * index / args.steps for index in range(-args.steps, args.steps + 1)]
    points = [(x, y) for y in steps for x in steps]
    losses = losses_at(model, directions, points, loss)
    found = [value for value in track_iter_progress((losses, len(points)))]
    found = [value if math.isfinite(value) else None for value in found]
    plane = [found[start : start + len(steps)] for start in range(0, len(found), len(steps))]
    return dict(steps=steps, line=plane[args.steps], plane=plane)


def read(path: str) -> dict:
    try:
        content = json.loads(Path(path).read_text())
        return {key: content[key] for key in ('name', 'steps', 'line', 'plane')}
    except (ValueError, KeyError):
        raise UserValueError(f'--beside: {path} is not a landscape.json of this tool') from None


@tool(parse_args)
def main(args: argparse.Namespace) -> None:
    cfg = read_config(args, 'model', f'{args.split}_dataloader', 'test_dataloader')
    check_writable(args.out_dir, '--out-dir')
    others = [read(path) for path in args.beside]
    check_datasets(cfg, (args.split,))
    model = loss_mode(load_compact_model(cfg, args.checkpoint).to(args.device))
    # Some losses have a term in the first iterations only.
    done = load_checkpoint(args.checkpoint).get('meta', {}).get('iter', 0)
    MessageHub.get_current_instance().update_info('iter', done)
    batches = read_batches(cfg, args, model)
    path = Path(args.checkpoint)
    found = dict(
        name=args.name or f'{path.parent.name}/{path.stem}',
        split=args.split,
        batches=len(batches),
        seed=args.seed,
        **survey(model, make_loss(batches, args.seed), args),
    )
    out_dir = Path(args.out_dir)
    write_text(json.dumps(found), out_dir / 'landscape.json')
    save_figure(draw([found, *others]), out_dir / 'landscape.png')
    print(
        f'\nloss {found["line"][args.steps]:.4g} at the centre; landscape.json and .png are in '
        f'{args.out_dir}'
    )


if __name__ == '__main__':
    main()
