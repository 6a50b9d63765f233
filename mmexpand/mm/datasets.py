"""Are the data sets of a config where it says they are, and can their files be read?"""

import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sized
from typing import Any

from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ..errors import UserError, UserFileNotFoundError
from .compact_config import dicts, type_name
from .logs import log


class DataError(UserError, RuntimeError):
    """Data that cannot be trained on or tested with; the message names the file."""


def check_datasets(cfg: Config, splits: tuple[str, ...]) -> None:
    """Refuse a config whose files are missing, before anything is built.

    What is not on this machine's disk is left alone: addresses, paths that a file backend maps,
    and data sets that download themselves.

    Args:
        cfg: the config.
        splits: which of 'train', 'val' and 'test' to look at.

    Raises:
        FileNotFoundError: names the key, the path that was looked for, and how to set it.
        DataError: if an annotation file is empty, or data to evaluate on has random labels.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if split != 'train' and any(type_name(n) == 'CorruptLabels' for n in dicts(loader)):
            raise DataError(
                f'{split}_dataloader.dataset has CorruptLabels, whose labels nothing can be '
                'evaluated on: put it around the data set of train_dataloader alone'
            )
        for key, dataset in _datasets((loader or {}).get('dataset'), f'{split}_dataloader.dataset'):
            if _is_elsewhere(dataset) or _downloads(dataset, cfg.get('default_scope')):
                continue
            for name, path in _paths(dataset):
                _check_path(key, name, path)
            # COCO's data set works with such classes, by searching the text.
            if words := text_classes(dataset):
                log(f'{key}: {words}', logging.WARNING)


def _check_path(key: str, name: str, path: str) -> None:
    if not os.path.exists(path):
        raise UserFileNotFoundError(
            f'{key}: {name} not found; looked for {os.path.abspath(path)}. Put the '
            f'data there, or say where it is: --cfg-options {key}.data_root=DIR'
        )
    if os.path.isfile(path) and not os.path.getsize(path):
        raise DataError(f'{key}: {name} is empty: {os.path.abspath(path)}. It must name samples')


def _datasets(node: Any, key: str) -> Iterator[tuple[str, Mapping]]:
    """Data sets that read files, through all wrappers around them."""
    if isinstance(node, (list, tuple)):
        for index, item in enumerate(node):
            yield from _datasets(item, f'{key}.{index}')
    elif isinstance(node, Mapping):
        if any(name in node for name in ('data_root', 'ann_file', 'data_prefix')):
            yield key, node
        for inner in ('dataset', 'datasets'):
            yield from _datasets(node.get(inner), f'{key}.{inner}')


def _is_elsewhere(dataset: Mapping) -> bool:
    """Whether another file backend than the disk's reads it, which may map any path.

    mmdet's and mmseg's configs say so in the loading steps of the pipeline, mostly in these alone.
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
        except RuntimeError:  # Unknown: building it will say so.
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
    """Have a Runner refuse data sets without samples, and name files that cannot be read.

    Every loader is looked at as it is built: an endless one reads ahead from then on.

    Args:
        runner: one that has not built its loops.
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
    """Return in words that the classes of a data set are a text; '' if they are not.

    Args:
        dataset: its config, or what is known of it: ``metainfo``.
    """
    classes = (dataset.get('metainfo') or {}).get('classes') or dataset.get('classes')
    if not isinstance(classes, str) or '://' in classes or os.path.isfile(classes):
        return ''
    return (
        f'classes={classes!r} is a text, and no file of class names: each of its letters would be '
        f'a class. Write a tuple, whose comma makes it one: classes=({classes!r},)'
    )


def no_samples(dataset: str, ann_file: Any, data_prefix: Any) -> str:
    """What to say of a data set that holds nothing.

    Args:
        dataset: the name of its class.
        ann_file: where it looks for samples, if anywhere.
        data_prefix: likewise.
    """
    return (
        f'{dataset} finds no samples: ann_file {ann_file or "(none)"}, data_prefix '
        f'{data_prefix or "(none)"}; look at these, at the suffixes of the files, and at filter_cfg'
    )


def guard_pipelines(dataset: Any) -> None:
    """Have a data set, and those inside it, name the file that they cannot read."""
    if type(getattr(dataset, 'pipeline', None)) is Compose:
        guarded = GuardedCompose([])
        guarded.transforms = dataset.pipeline.transforms
        dataset.pipeline = guarded
    for inner in (getattr(dataset, 'dataset', None), *getattr(dataset, 'datasets', ())):
        if inner is not None:
            guard_pipelines(inner)


class GuardedCompose(Compose):
    """A pipeline whose loading steps name the file that they cannot read."""

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
    return (
        f'{path} cannot be read by {type(step).__name__} ({reason}): replace it, or take it out '
        'of the data set'
    )


def _check_mask(data: Mapping) -> None:
    mask, size = data.get('gt_seg_map'), data.get('ori_shape')
    if mask is not None and size is not None and tuple(mask.shape[:2]) != tuple(size[:2]):
        raise DataError(
            f'{data.get("seg_map_path")} is a mask of {mask.shape[0]}x{mask.shape[1]} pixels, its '
            f'image {data.get("img_path")} has {size[0]}x{size[1]}: draw it anew, or take both '
            'out of the data set'
        )
