"""Checks of a config's data sets: the files exist, can be read and have samples."""

import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ..errors import UserError, UserFileNotFoundError
from .compact_config import dicts, hook_configs, type_name
from .logs import log


class DataError(UserError, RuntimeError):
    """Data that cannot be used for training or testing; the message names the file."""


def check_datasets(cfg: Config, splits: tuple[str, ...]) -> None:
    """Raise FileNotFoundError if a config's data files are missing, before anything is built.

    Data outside this machine's disk is skipped: URLs, paths that a file backend maps, and data
    sets that download themselves.

    Args:
        cfg: the config.
        splits: the splits to check, of 'train', 'val' and 'test'.

    Raises:
        FileNotFoundError: naming the key, the missing path and how to set it.
        DataError: if an annotation file is empty, or validation or test labels would be random
            and are not those of the training set.
    """
    trained = (cfg.get('train_dataloader') or {}).get('dataset')
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        types = {type_name(node) for node in dicts(loader)}
        # The training set itself gives the training error.
        if 'CorruptLabels' in types and loader.get('dataset') != trained:
            raise DataError(
                f'{split}_dataloader.dataset has CorruptLabels, and random labels cannot evaluate '
                'a network: wrap the data set of train_dataloader only'
            )
        if 'CorruptLabels' in types and 'PipelineSwitchHook' in map(type_name, hook_configs(cfg)):
            raise DataError(
                'PipelineSwitchHook cannot change the pipeline of a data set inside CorruptLabels: '
                'remove the hook'
            )
        for key, dataset in _datasets((loader or {}).get('dataset'), f'{split}_dataloader.dataset'):
            if _is_elsewhere(dataset) or _downloads(dataset, cfg.get('default_scope')):
                continue
            for name, path in _paths(dataset):
                _check_path(key, name, path)
            # Only a warning: COCO's data set works with classes that are a text.
            if words := text_classes(dataset):
                log(f'{key}: {words}', logging.WARNING)


def _check_path(key: str, name: str, path: str) -> None:
    if not os.path.exists(path):
        raise UserFileNotFoundError(
            f'{key}: {name} not found; looked for {os.path.abspath(path)}. Put the data there, or '
            f'set its folder: --cfg-options {key}.data_root=DIR'
        )
    if os.path.isfile(path) and not os.path.getsize(path):
        raise DataError(f'{key}: {name} is empty: {os.path.abspath(path)}. Add samples to it')


def _datasets(node: Any, key: str) -> Iterator[tuple[str, Mapping]]:
    """Yield the configs of data sets that read files, inside all wrappers."""
    if isinstance(node, (list, tuple)):
        for index, item in enumerate(node):
            yield from _datasets(item, f'{key}.{index}')
    elif isinstance(node, Mapping):
        if any(name in node for name in ('data_root', 'ann_file', 'data_prefix')):
            yield key, node
        for inner in ('dataset', 'datasets'):
            yield from _datasets(node.get(inner), f'{key}.{inner}')


def _is_elsewhere(dataset: Mapping) -> bool:
    """Return whether a data set uses a file backend other than the disk, which may map any path.

    mmdet's and mmseg's configs mostly set the backend in the pipeline's loading steps only.
    """
    names = ('backend_args', 'file_client_args')
    backends = (node.get(key) or {} for node in dicts(dataset) for key in names)
    return any(
        args.get('backend', 'local') not in ('local', 'disk') or 'path_mapping' in args
        for args in backends
    )


def _downloads(dataset: Mapping, scope: str | None) -> bool:
    if 'download' in dataset:
        return bool(dataset['download'])
    kind = dataset.get('type')
    if isinstance(kind, str):
        try:
            with DATASETS.switch_scope_and_registry(scope) as registry:
                kind = registry.get(kind)
        except RuntimeError:  # Building an unknown type raises the error later.
            return False
    if not callable(kind):
        return False
    parameter = inspect.signature(kind).parameters.get('download')
    return parameter is not None and parameter.default is True


def _paths(dataset: Mapping) -> Iterator[tuple[str, str]]:
    root = dataset.get('data_root') or ''
    prefix = dataset.get('data_prefix') or {}
    named = dict(prefix) if isinstance(prefix, Mapping) else {'data_prefix': prefix}
    named['ann_file'] = dataset.get('ann_file')
    if root and '://' not in root:
        yield 'data_root', root
    for name, path in named.items():
        if isinstance(path, str) and path and '://' not in root + path:
            yield name, os.path.join(root, path)


def guard_data(runner: Runner) -> None:
    """Make a Runner raise DataError for empty data sets and files that cannot be read.

    Each loader is checked when it is built, since an infinite loader then starts to read ahead.

    Args:
        runner: a Runner that has not built its loops.
    """
    build = runner.build_dataloader

    def build_guarded(*args: Any, **kwargs: Any) -> DataLoader:
        loader = build(*args, **kwargs)
        dataset = loader.dataset
        if isinstance(dataset, Sized) and not len(dataset):
            where = (getattr(dataset, key, None) for key in ('ann_file', 'data_prefix'))
            words = text_classes(dict(metainfo=getattr(dataset, 'metainfo', None)))
            raise DataError(words or no_samples(type(dataset).__name__, *where))
        guard_pipelines(dataset)
        return loader

    runner.build_dataloader = build_guarded


def text_classes(dataset: Mapping) -> str:
    """Return a message if the classes of a data set are a text; '' if they are not.

    Args:
        dataset: its config, or a dict with its ``metainfo``.
    """
    classes = (dataset.get('metainfo') or {}).get('classes') or dataset.get('classes')
    if not isinstance(classes, str) or '://' in classes or os.path.isfile(classes):
        return ''
    return (
        f'classes={classes!r} is a text, not a file of class names, so that each letter would be a '
        f'class. Write a tuple with a comma: classes=({classes!r},)'
    )


def no_samples(dataset: str, ann_file: Any, data_prefix: Any) -> str:
    """Return the message for a data set without samples.

    Args:
        dataset: the name of its class.
        ann_file: its annotation file, if any.
        data_prefix: its data prefix, if any.
    """
    return (
        f'{dataset} finds no samples: ann_file {ann_file or "(none)"}, data_prefix '
        f'{data_prefix or "(none)"}; check both paths, the suffixes of the files, and filter_cfg'
    )


def guard_pipelines(dataset: Any) -> None:
    """Make a data set and its inner data sets raise DataError for files that cannot be read."""
    if type(getattr(dataset, 'pipeline', None)) is Compose:
        guarded = GuardedCompose([])
        guarded.transforms = dataset.pipeline.transforms
        dataset.pipeline = guarded
    for inner in (getattr(dataset, 'dataset', None), *getattr(dataset, 'datasets', ())):
        if inner is not None:
            guard_pipelines(inner)


class GuardedCompose(Compose):
    """A pipeline that names the file which a loading step cannot read."""

    def __call__(self, data: dict) -> dict | None:
        """Run the steps one after another, as ``Compose`` does.

        Raises:
            DataError: naming the file.
        """
        for step in self.transforms:
            loading = type(step).__name__.startswith('Load')
            try:
                result = step(data)
            except Exception as error:
                if not loading:
                    raise
                raise DataError(_unreadable(data, step, error)) from error
            if result is None:
                return None
            data = result
            if loading:
                _check_mask(data)
        return data


def _unreadable(data: Mapping, step: Any, error: Exception) -> str:
    what = 'seg_map_path' if 'Annotations' in type(step).__name__ else 'img_path'
    path = data.get(what) or data.get('img_path')
    reason = f'{type(error).__name__}: {error}' if os.path.exists(str(path)) else 'no such file'
    reason = ' '.join(reason.split())
    if what not in data and isinstance(error, (KeyError, IndexError, TypeError, AttributeError)):
        return (
            f'the annotations of {path} do not fit {type(step).__name__} ({reason}): change the '
            'options of this step, or the annotation file'
        )
    return (
        f'{path} cannot be read by {type(step).__name__} ({reason}): replace it, or remove it '
        'from the data set'
    )


def _check_mask(data: Mapping) -> None:
    mask, size = data.get('gt_seg_map'), data.get('ori_shape')
    if mask is not None and size is not None and tuple(mask.shape[:2]) != tuple(size[:2]):
        raise DataError(
            f'{data.get("seg_map_path")} is a mask of {mask.shape[0]}x{mask.shape[1]} pixels, but '
            f'its image {data.get("img_path")} has {size[0]}x{size[1]}: replace the mask, or '
            'remove both from the data set'
        )


def innermost(dataset: ConfigDict) -> list[ConfigDict]:
    """Return the data sets inside all wrappers."""
    inside = [dataset['dataset']] if 'dataset' in dataset else dataset.get('datasets')
    return [dataset] if inside is None else [leaf for one in inside for leaf in innermost(one)]


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return at most ``count`` indices, from the first to the last."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()
