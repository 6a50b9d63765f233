"""Are the data sets of a config where it says they are?"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config


def check_datasets(cfg: Config, splits: tuple[str, ...]) -> None:
    """Refuse a config whose files are missing, before anything is built.

    Args:
        cfg: the config.
        splits: which of 'train', 'val' and 'test' to look at.

    Raises:
        FileNotFoundError: names the key, the path that was looked for, and how to set it.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        for key, dataset in _datasets((loader or {}).get('dataset'), f'{split}_dataloader.dataset'):
            for name, path in _paths(dataset):
                if not os.path.exists(path):
                    raise FileNotFoundError(
                        f'{key}: {name} not found; looked for {os.path.abspath(path)}. Put the '
                        f'data there, or say where it is: --cfg-options {key}.data_root=DIR'
                    )


def _datasets(node: Any, key: str) -> Iterator[tuple[str, Mapping]]:
    """Data sets that read files, through all wrappers around them."""
    if isinstance(node, (list, tuple)):
        for index, item in enumerate(node):
            yield from _datasets(item, f'{key}.{index}')
    elif isinstance(node, Mapping):
        if 'data_root' in node or 'ann_file' in node:
            yield key, node
        for inner in ('dataset', 'datasets'):
            yield from _datasets(node.get(inner), f'{key}.{inner}')


def _paths(dataset: Mapping) -> Iterator[tuple[str, str]]:
    root = dataset.get('data_root') or ''
    named = {'ann_file': dataset.get('ann_file'), **(dataset.get('data_prefix') or {})}
    if root:
        yield 'data_root', root
    for name, path in named.items():
        if isinstance(path, str) and path and '://' not in root + path:
            yield name, os.path.join(root, path)
