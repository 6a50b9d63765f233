"""The model of a config without a Runner: compact, or expanded as its hooks and builders say."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from ..core import ExpandedConv2d
from ..surgery import ExpandConfig, expand_
from .compact_config import BUILDERS, hook_configs, make_compact_config, type_name

Wish = tuple[str, ExpandConfig]
"""The name of a part of the model ('' for all of it), and how to expand it."""


def build_compact_model(cfg: Config) -> nn.Module:
    """The compact model of a config, as stock OpenMMLab builds it."""
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    compact = make_compact_config(cfg)
    model = compact.model
    if compact.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', compact.data_preprocessor)
    return MODELS.build(model)


def expand_wishes(cfg: Config) -> list[Wish]:
    """What the ExpandHooks and builders in a config ask for."""
    wishes = [
        ('', _expand_config(hook, ()))
        for hook in hook_configs(cfg)
        if type_name(hook) == 'ExpandHook'
    ]
    return wishes + list(_builder_wishes(cfg.model, ''))


def build_expanded_model(cfg: Config) -> nn.Module:
    """The model of a config, expanded as it says.

    Raises:
        ValueError: if it asks for no expansion.
    """
    wishes = expand_wishes(cfg)
    if not wishes:
        raise ValueError(
            'the config expands nothing: it has no ExpandHook, ExpandModel or ExpandBackbone'
        )
    model = build_compact_model(cfg)
    for name, expand_config in wishes:
        expand_(model.get_submodule(name), expand_config)
    return model


def input_channels(model: nn.Module) -> int:
    """How many channels the images of a model have.

    Args:
        model: an OpenMMLab model, compact or expanded.
    """
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
    if mean is not None and len(mean) > 1:  # One value serves any number of channels.
        return len(mean)
    for module in getattr(model, 'backbone', model).modules():
        if isinstance(module, (nn.Conv2d, ExpandedConv2d)):
            return module.in_channels
    return 3


def tensor_outputs(model: nn.Module, data: dict) -> Any:
    """The raw outputs of an OpenMMLab model: what its heads compute, before any decoding.

    Args:
        model: a detector, segmentor or classifier.
        data: of its data preprocessor: ``inputs`` and, optionally, ``data_samples``.
    """
    # Two-stage detectors pick proposals by score: rounding flips ties, so features are compared.
    if hasattr(model, 'roi_head'):
        return model.extract_feat(data['inputs'])
    return model(**data, mode='tensor')


def raw_forward(data: dict) -> Callable[[nn.Module], Any]:
    """What to compare of models on this data: raw outputs, or features where there are none.

    Args:
        data: of the data preprocessor: ``inputs`` and, optionally, ``data_samples``.
    """
    said = []

    def forward(model: nn.Module) -> Any:
        try:
            return tensor_outputs(model, data)
        except TypeError as error:
            # Mask classification, for one: its heads want the data samples in their forward.
            if not said:
                said.append(error)
                name = type(model).__name__
                print_log(f'{name} has no raw outputs ({error}): features are compared', 'current')
            return model.extract_feat(data['inputs'])

    return forward


def _builder_wishes(node: Any, path: str) -> Iterator[Wish]:
    if not isinstance(node, Mapping):
        return
    inner = BUILDERS.get(type_name(node))
    if inner:
        yield path, _expand_config(node, (inner, 'data_preprocessor'))
        yield from _builder_wishes(node[inner], path)
        return
    for key, value in node.items():
        yield from _builder_wishes(value, f'{path}.{key}'.lstrip('.'))


def _expand_config(node: Mapping, others: tuple[str, ...]) -> ExpandConfig:
    ignored = {'type', 'priority', '_scope_', *others}
    return ExpandConfig(**{key: value for key, value in node.items() if key not in ignored})
