"""The compact or expanded model of a config, built without a Runner."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mmengine.config import Config
from mmengine.model import BaseAveragedModel, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from ..core import ExpandedConv2d
from ..core.factor import ConvFactor, LinearFactor, SkippingFactor
from ..errors import UserValueError
from ..surgery import ExpandConfig, expand_
from .compact_config import BUILDERS, dicts, hook_configs, make_compact_config, type_name

Expansion = tuple[str, ExpandConfig]
"""The name of a submodule ('' for the whole model), and its expansion."""


def build_compact_model(cfg: Config) -> nn.Module:
    """Build the compact model of a config, as stock OpenMMLab's ``init_detector`` does.

    SyncBN, which requires a process group, becomes a batch norm.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    compact = make_compact_config(cfg)
    model = compact.model
    if compact.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', compact.data_preprocessor)
    return revert_sync_batchnorm(MODELS.build(model))


def configured_expansions(cfg: Config) -> list[Expansion]:
    """Return the expansions of the ExpandHooks and builders in a config.

    'auto' becomes 'default', since the initial weights of these models are not used.
    """
    expansions = [
        ('', _expand_config(hook, ()))
        for hook in hook_configs(cfg)
        if type_name(hook) == 'ExpandHook'
    ]
    return [*_builder_expansions(cfg.model, ''), *expansions]  # Builders run first.


def set_expansion(cfg: Config, options: Mapping[str, Any]) -> None:
    """Set options of all ExpandHooks and builders of a config, or add both hooks if it has none.

    Args:
        cfg: changed in place.
        options: arguments of ``ExpandHook``; if empty, nothing changes.
    """
    if not options:
        return
    expanding = [hook for hook in hook_configs(cfg) if type_name(hook) == 'ExpandHook']
    expanding += [node for node in dicts(cfg.model) if type_name(node) in BUILDERS]
    for node in expanding:
        node.update(options)
    if not expanding:
        cfg.merge_from_dict(expansion_options(cfg, options))


def expansion_options(cfg: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``cfg_options`` that add ExpandHook and ContractHook to a config.

    Args:
        cfg: a config that expands nothing.
        options: arguments of ``ExpandHook``.
    """
    imported = (cfg.get('custom_imports') or {}).get('imports') or ()
    imported = [imported] if isinstance(imported, str) else list(imported)
    # Keys with dots leave other hooks in a user's options.
    hooks = {'default_hooks.expand': dict(type='ExpandHook', **options)}
    if not any(type_name(hook) == 'ContractHook' for hook in hook_configs(cfg)):
        hooks['default_hooks.contract'] = dict(type='ContractHook')
    return dict(
        custom_imports=dict(imports=[*imported, 'mmexpand'], allow_failed_imports=False), **hooks
    )


def build_expanded_model(cfg: Config) -> nn.Module:
    """Build the expanded model of a config.

    Raises:
        ValueError: if the config expands nothing.
    """
    if not configured_expansions(cfg):
        raise UserValueError(
            'the config expands nothing: add an ExpandHook, ExpandModel or ExpandBackbone'
        )
    model = build_compact_model(cfg)
    expand_as_configured(model, cfg)
    return model


def expand_as_configured(model: nn.Module, cfg: Config) -> None:
    """Expand a model by its config, except layers that a builder has expanded."""
    for name, expansion in configured_expansions(cfg):
        expand_(model.get_submodule(name), expansion)


def input_channels(model: nn.Module) -> int:
    """Return the number of channels of the images of a model, compact or expanded."""
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
    if mean is not None and len(mean) > 1:  # A single value applies to any number of channels.
        return len(mean)
    for module in getattr(model, 'backbone', model).modules():
        if type(module).__name__ == 'Focus':  # YOLOX turns four pixels into channels.
            return module.conv.conv.in_channels // 4
        if isinstance(module, (nn.Conv2d, ExpandedConv2d)):
            return module.in_channels
    return 3


def tensor_outputs(model: nn.Module, data: dict) -> Any:
    """Return the raw outputs of an OpenMMLab model's heads, before any decoding.

    For a two-stage detector, which selects proposals by score, return the features.

    Args:
        model: a detector, segmentor or classifier.
        data: output of its data preprocessor: ``inputs`` and, optionally, ``data_samples``.
    """
    return features(model, data) if selects_by_score(model) else model(**data, mode='tensor')


def selects_by_score(model: nn.Module) -> bool:
    """Return whether the tensor mode selects by score, so that rounding may change its outputs."""
    return hasattr(model, 'roi_head')


def features(model: nn.Module, data: dict) -> Any:
    """Return the features that the heads of an OpenMMLab model get."""
    return model.extract_feat(data['inputs'])


def refresh_average(averaged: BaseAveragedModel) -> None:
    """Make an averaged copy in a model average its current parameters."""
    inside = averaged.module
    averaged.avg_parameters = (
        inside.state_dict() if averaged.update_buffers else dict(inside.named_parameters())
    )


def _builder_expansions(node: Any, path: str) -> Iterator[Expansion]:
    if not isinstance(node, Mapping):
        return
    inner = BUILDERS.get(type_name(node))
    if inner:
        yield path, _expand_config(node, (inner, 'data_preprocessor'))
        yield from _builder_expansions(node[inner], path)
        return
    for key, value in node.items():
        yield from _builder_expansions(value, f'{path}.{key}'.lstrip('.'))


def _expand_config(node: Mapping, others: tuple[str, ...]) -> ExpandConfig:
    own = ('compact_gradients', 'warm_start', 'freeze_norms')
    ignored = {'type', 'priority', '_scope_', *own, *others}
    cfg = ExpandConfig.of({key: value for key, value in node.items() if key not in ignored})
    return replace(cfg, init='default') if cfg.init == 'auto' else cfg


def converts_channels(data_preprocessor: nn.Module) -> bool:
    """Return whether a data preprocessor reverses the order of the images' channels."""
    # The names in mmengine and mmdet, in mmseg, and in mmpretrain.
    names = ('_channel_conversion', 'channel_conversion', 'to_rgb')
    return any(getattr(data_preprocessor, name, False) for name in names)


# mmengine's initialisations choose layers by the name of their class or of a base class.
FACTOR_NAMES = {
    kind.__name__
    for factor in (ConvFactor, SkippingFactor, LinearFactor)
    for kind in (factor, *factor.__bases__)
}


def reaches_factors(init_cfg: Mapping | None) -> bool:
    """Return whether an initialisation applies to factors, which are convolutions or linear."""
    if init_cfg is None or type_name(init_cfg) == 'Pretrained':
        return False
    layers = init_cfg.get('layer') or ()
    layers = {layers} if isinstance(layers, str) else set(layers)
    # An override initialises a whole submodule, whatever its layers are.
    return 'override' in init_cfg or bool(layers & FACTOR_NAMES)
