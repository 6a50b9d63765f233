"""The compact network of a config and a checkpoint, and its input images."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, Registry
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from ..errors import ExportError, UserFileNotFoundError, UserValueError
from ..mm.checkpoints import match_checkpoint
from ..mm.compact_config import dicts, type_name
from ..mm.datasets import evenly_spaced, innermost
from ..mm.models import build_compact_model
from ..surgery.checkpoint import CheckpointError, get_state_dict, load_checkpoint
from ..surgery.fake_quantisation import INT8_KEY


def load_compact_model(cfg: Config, checkpoint: str | os.PathLike) -> nn.Module:
    """Return the compact model of a config with a checkpoint's weights, in eval mode on the CPU.

    Args:
        cfg: the expanded or the compact config.
        checkpoint: file of the expanded or the compact network; the former is contracted.

    Raises:
        CheckpointError: if the file cannot be read or belongs to another network.
    """
    model = build_compact_model(cfg)
    content = dict(load_checkpoint(checkpoint))
    try:
        match_checkpoint(model, content)
        model.load_state_dict(get_state_dict(content))
    except RuntimeError as error:
        # An error of the guard, or of torch, which names unexpected keys.
        raise CheckpointError(
            f'{checkpoint} does not fit the config: {error}; use the config it was trained with'
        ) from None
    model.eval()  # Its own train() may return nothing: mmdet's LD.
    return model


def trained_ranges(checkpoint: str | os.PathLike) -> dict | None:
    """Return the int8 target and ranges that QuantHook has put into a checkpoint; None if none.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    return load_checkpoint(checkpoint).get('meta', {}).get(INT8_KEY)


def preprocess(model: nn.Module, cfg: Config, image: str | os.PathLike) -> Tensor:
    """Return an image after the test pipeline.

    Args:
        model: a model, for its data preprocessor.
        cfg: a config, for its test pipeline; annotations are not required.
        image: the path of the image.

    Returns:
        The image of shape (1, C, H, W), float32, normalised and padded.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is not an image.
    """
    if not Path(image).is_file():
        raise UserFileNotFoundError(f'{image}: no such image')
    try:
        data = Compose(_test_steps(cfg))(dict(img_path=str(image), img_id=0))
    except AssertionError as error:
        raise UserValueError(f'{image} cannot be decoded as an image') from error
    return _network_input(model, data)


def check_not_normalised(cfg: Config) -> None:
    """Check that images leave the test pipeline as pixels, which a file can normalise.

    Raises:
        ExportError: if the pipeline normalises images.
    """
    kinds = [str(type_name(step)) for step in dicts(_test_steps(cfg))]
    if found := [kind for kind in kinds if kind.rpartition('.')[2] == 'Normalize']:
        raise ExportError(
            f'the test pipeline has {found[0]}, so that the file would get normalised images '
            'instead of pixels: move mean and std to data_preprocessor, or leave out --preprocess'
        )


def calibration_images(
    model: nn.Module, cfg: Config, count: int, size: Sequence[int]
) -> list[Tensor]:
    """Return images, evenly spaced in the training split, after the test pipeline.

    Args:
        model: a model, for its data preprocessor.
        cfg: a config, for its training split and its test pipeline.
        count: number of images.
        size: height and width of the images after resizing.

    Raises:
        ExportError: if the split has fewer images.
    """
    datasets = [copy.deepcopy(dataset) for dataset in innermost(cfg.train_dataloader.dataset)]
    for dataset in datasets:
        if 'pipeline' in dataset:  # A data set without one gives tensors.
            dataset.pipeline = _test_steps(cfg)
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        images = ConcatDataset([_built(registry, dataset) for dataset in datasets])
    if len(images) < count:
        raise ExportError(
            f'int8 requires {count} calibration images, but {type_name(datasets[0])} of '
            f'train_dataloader has {len(images)}; '
            + (f'use --int8 {len(images)}' if len(images) else 'use a data set with images')
        )
    found = [_network_input(model, images[i]) for i in evenly_spaced(len(images), count)]
    return [F.interpolate(image, tuple(size), mode='bilinear') for image in found]


def _built(registry: Registry, dataset: ConfigDict) -> Sequence[dict]:
    try:
        return registry.build(dataset)
    except ValueError as error:
        # mmengine joins the bytes of a data set's samples, and numpy cannot join an empty list.
        if 'concatenate' in str(error):
            return ()
        raise


def _test_steps(cfg: Config) -> list[ConfigDict]:
    dataset = innermost(cfg.test_dataloader.dataset)[0]
    pipeline = dataset.get('pipeline')
    if not pipeline:
        raise ExportError(
            f'{type_name(dataset)}, of test_dataloader, has no pipeline to load an image with: '
            'from Python, mmexpand.deploy.export_onnx(model, images, path) takes them as tensors'
        )
    return [step for step in pipeline if type_name(step) != 'LoadAnnotations']


def _network_input(model: nn.Module, data: dict) -> Tensor:
    return model.data_preprocessor(pseudo_collate([data]), False)['inputs']
