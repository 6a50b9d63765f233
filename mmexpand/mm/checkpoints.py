"""Checks and conversions of checkpoints before mmengine's Runner loads them."""

from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from ..core.blocks import methods
from ..surgery import contract_, is_expanded, named_units, names_of_units
from ..surgery.checkpoint import (
    META_KEY,
    CheckpointError,
    contract_state_dict,
    expanded_layers,
    get_state_dict,
    is_expanded_state_dict,
)
from ..surgery.copying import copy_model
from .compat import set_hooks

DISTILL_LOSSES = 'distill_losses'
"""Name of the submodule that holds a teacher's losses, which the compact network omits."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a distributed or test-time-augmentation wrapper."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def put_in_front(runner: Runner, hook: Hook) -> None:
    """Put a hook before all others.

    Args:
        runner: its list of hooks is replaced, since mmengine may be iterating over the old one.
        hook: the hook, which is first called at the next event.
    """
    set_hooks(runner, [hook, *runner.hooks])


def describe_units(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return a plain description of a model's units for a checkpoint's meta."""
    return {
        name: dict(
            method=unit.method,
            rate=unit.rate,
            factor_shapes=unit.factor_shapes,
            **unit.spec.options.chosen,
        )
        for name, unit in named_units(model).items()
    }


def match_checkpoint(model: nn.Module, checkpoint: dict, purpose: str = 'test') -> None:
    """Convert a checkpoint or a model such that they fit, or raise CheckpointError.

    An expanded checkpoint for a compact model is contracted in memory. The units of an expanded
    model factorise a compact checkpoint while they load it. If the rate makes that impossible,
    the model is contracted for a test, and training is refused.

    Args:
        model: the model that is about to load the checkpoint.
        checkpoint: changed in place.
        purpose: 'test'; 'start': a training starts from the weights; 'resume': a training
            continues, with optimizer states that must be of the model's kind.

    Raises:
        CheckpointError: naming the first layer that does not fit, and the fix.
    """
    state_dict = get_state_dict(checkpoint)
    if state_dict and all(key.startswith('module.') for key in state_dict):
        state_dict = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    _replace_state_dict(checkpoint, state_dict)
    if not hasattr(model, DISTILL_LOSSES):
        _drop_distill_losses(state_dict, purpose == 'resume')
    _check_nonlinear(model, checkpoint, starts=purpose == 'start')
    if is_expanded_state_dict(state_dict):
        _check_methods(checkpoint)
        _match_expanded(model, checkpoint, state_dict, purpose)
    else:
        _match_compact(model, state_dict, purpose)
    if purpose != 'start':
        # Fine-tuning from a checkpoint with other classes is common, testing with it is not.
        check_shapes(model, checkpoint)


def _match_expanded(model: nn.Module, checkpoint: dict, state_dict: dict, purpose: str) -> None:
    expanded = is_expanded(model)
    if expanded and (purpose != 'start' or not _other_units(model, state_dict)):
        _check_same_units(model, state_dict)
        return
    if purpose == 'resume':
        raise CheckpointError(
            'the checkpoint is of an expanded model, but the config expands nothing: resume with '
            'the config that it was trained with (ExpandHook or ExpandModel), or contract it with '
            'tools/contract.py and set load_from'
        )
    # Factors of another rate or block cannot be loaded, but their compact network can.
    compact = _contract_weights(checkpoint, state_dict)
    if expanded:
        _match_compact(model, compact, purpose)


def _match_compact(model: nn.Module, state_dict: Mapping, purpose: str) -> None:
    if not is_expanded(model):
        return
    if purpose == 'resume':
        raise CheckpointError(
            'the checkpoint is of a compact model, but the config expands: its optimizer states '
            'do not fit, so that it cannot be resumed; start from its weights with load_from, or '
            'continue with ExpandHook(warm_start=True)'
        )
    refusal = _factorise_refusal(model, state_dict)
    if refusal and purpose == 'start':
        raise CheckpointError(
            f'a compact checkpoint cannot start this expanded model: {refusal}; or remove load_from'
        )
    if refusal:
        contract_(model)


def _contract_weights(checkpoint: dict, state_dict: dict) -> dict:
    """Contract a checkpoint's weights and return them."""
    # mmpretrain's EMAHook reads the averages in every run, mmengine's in a resumed run only.
    if 'ema_state_dict' in checkpoint:
        checkpoint['ema_state_dict'] = contract_state_dict(checkpoint['ema_state_dict'])
    compact = contract_state_dict(state_dict)
    _replace_state_dict(checkpoint, compact)
    return compact


def nonlinear_layers(checkpoint: Mapping) -> set[str]:
    """Return the names of a checkpoint's layers that have ReLU between their factors."""
    return {name for name, layer in _layers(checkpoint).items() if layer.get('nonlinear')}


def _layers(checkpoint: Mapping) -> Mapping[str, dict]:
    return checkpoint.get('meta', {}).get(META_KEY, {}).get('layers', {})


def _check_methods(checkpoint: Mapping) -> None:
    for name, layer in _layers(checkpoint).items():
        if layer['method'] not in methods():
            raise CheckpointError(
                f'{name} has the block {layer["method"]!r}, which is unknown: name the module that '
                'registers it in custom_imports. Checkpoints of former versions are unsupported: '
                'contract them with the version that wrote them'
            )


def _check_nonlinear(model: nn.Module, checkpoint: Mapping, starts: bool) -> None:
    """Raise CheckpointError if layers with ReLU between factors would be loaded as linear ones."""
    theirs = nonlinear_layers(checkpoint)
    ours = {name for name, unit in named_units(model).items() if not unit.has_kernel}
    if starts and theirs:
        wrong = theirs if _other_units(model, get_state_dict(checkpoint)) else set()
    else:
        wrong = set() if starts else theirs ^ ours
    if wrong:
        raise CheckpointError(
            f"{min(wrong)} has ReLU between its factors (nonlinear='relu') in the "
            f'{"checkpoint" if theirs else "model"}, so that no convolution or linear chain is '
            'equal to it: use the config that the checkpoint was trained with, or, to start a '
            'linear training from it, the same method, rate and include with load_from'
        )


def _drop_distill_losses(state_dict: dict, resume: bool) -> None:
    losses = [key for key in state_dict if key.startswith(f'{DISTILL_LOSSES}.')]
    if losses and resume:
        raise CheckpointError(
            f"the checkpoint holds {losses[0]}, a parameter of a teacher's loss, but the config "
            'has no such loss: resume with the DistillHook that it was trained with, or start '
            'from its weights with load_from'
        )
    for key in losses:
        del state_dict[key]


def _replace_state_dict(checkpoint: dict, state_dict: Mapping) -> None:
    if 'state_dict' in checkpoint:
        checkpoint['state_dict'] = state_dict
    elif checkpoint is not state_dict:
        checkpoint.clear()
        checkpoint.update(state_dict)


def _other_units(model: nn.Module, state_dict: Mapping) -> bool:
    try:
        _check_same_units(model, state_dict)
    except CheckpointError:
        return True
    return False


def _check_same_units(model: nn.Module, state_dict: Mapping) -> None:
    # A state dict holds a shared layer under each of its names.
    ours = {
        name: {key: tuple(value.shape) for key, value in unit.state_dict().items()}
        for unit, names in names_of_units(model).items()
        for name in names
    }
    theirs = expanded_layers(state_dict)
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f'{name} has factors {_shapes(theirs, name)} in the checkpoint and '
                f'{_shapes(ours, name)} in the model: use the method, rate and include that '
                'the checkpoint was trained with, or contract it with tools/contract.py first'
            )


def _shapes(layers: Mapping, name: str) -> str:
    held = layers.get(name, {})
    return (
        ', '.join(str(shape) for key, shape in held.items() if key.endswith('weight')) or '(none)'
    )


def _factorise_refusal(model: nn.Module, state_dict: Mapping) -> str:
    for name, unit in named_units(model).items():
        reason = unit.expression.kernel_refusal()
        if reason and f'{name}.weight' in state_dict:
            return f'{name}, method {unit.method!r}, rate {unit.rate}: {reason}'
    return ''


def check_shapes(model: nn.Module, checkpoint: Mapping) -> None:
    """Raise CheckpointError, naming the first, if parameters of a model are missing or differ."""
    problem = _misfit(model, checkpoint)
    if problem and not _loads(model, get_state_dict(checkpoint)):
        raise CheckpointError(problem)


def _misfit(model: nn.Module, checkpoint: Mapping) -> str:
    """Return the first parameter that is missing or has another shape, for an error; or ''."""
    state_dict = get_state_dict(checkpoint)
    found = {key.removeprefix('module.') for key in state_dict}
    missing = [key for key in _parameter_names(model, state_dict) if key not in found]
    if missing:
        return (
            f'the checkpoint lacks {len(missing)} of the parameters of {type(model).__name__}, '
            f'{missing[0]} first; it is of another network (its keys are like '
            f'{next(iter(state_dict), "(none)")!r}): use a checkpoint of this network'
        )
    for key, value in model.state_dict().items():
        given = state_dict.get(key, value)
        if given.shape != value.shape:
            return (
                f'{key} has shape {tuple(given.shape)} in the checkpoint and {tuple(value.shape)} '
                f'in the model{_classes(checkpoint)}'
            )
    return ''


def _loads(model: nn.Module, state_dict: Mapping) -> bool:
    """Return whether a model converts a state dict while loading, as ViT resizes its positions."""
    probe = copy_model(model)
    try:
        missing = set(probe.load_state_dict(state_dict, strict=False).missing_keys)
    except Exception:
        return False
    return missing.isdisjoint(name for name, _ in probe.named_parameters())


def _parameter_names(model: nn.Module, state_dict: Mapping) -> list[str]:
    """Return the keys that a checkpoint must have, with the units' factors or compact weights."""
    names = [name for name, _ in model.named_parameters()]
    if is_expanded_state_dict(state_dict):
        return names
    units = named_units(model)
    inside = tuple(f'{name}.' for name in units)
    others = [name for name in names if not (inside and name.startswith(inside))]
    return [f'{name}.weight' for name in units] + others


def _classes(checkpoint: Mapping) -> str:
    meta = checkpoint.get('meta', {}).get('dataset_meta') or {}
    classes = meta.get('classes', meta.get('CLASSES'))
    if not classes:
        return '; it is of another network: use a checkpoint of this network'
    shown = ', '.join(map(str, classes[:5])) + (', ...' if len(classes) > 5 else '')
    return (
        f'; it was trained on {len(classes)} classes ({shown}): set num_classes and the '
        "data set's metainfo accordingly"
    )
