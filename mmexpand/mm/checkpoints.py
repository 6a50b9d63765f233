"""What mmengine's Runner saves and loads, marked and checked: never half loaded."""

from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from ..core.expression import kernel_refusal
from ..surgery import contract_, is_expanded, named_units, names_of_units
from ..surgery.checkpoint import (
    META_KEY,
    CheckpointError,
    contract_state_dict,
    expanded_layers,
    get_state_dict,
    is_expanded_state_dict,
)
from .compat import has_train_loop, set_hooks

DISTILL_LOSSES = 'distill_losses'
"""Where a model holds what is trained with it and is no part of it: a teacher's losses."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a distributed or test-time-augmentation wrapper."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def is_training(runner: Runner) -> bool:
    """Whether ``runner.train()`` is what runs: only it builds the train loop."""
    return has_train_loop(runner)


def put_in_front(runner: Runner, hook: Hook) -> None:
    """Call a hook before all others.

    Args:
        runner: its list of hooks is replaced, since hooks may be being called from the present one.
        hook: it is in the list from the next call on.
    """
    set_hooks(runner, [hook, *runner.hooks])


def describe_units(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What is expanded in a model: plain values for a checkpoint's meta."""
    return {
        name: dict(method=unit.method, rate=unit.rate, factor_shapes=unit.factor_shapes)
        for name, unit in named_units(model).items()
    }


def match_checkpoint(
    model: nn.Module, checkpoint: dict, training: bool = False, resume: bool = False
) -> None:
    """Make a model and a checkpoint fit each other, or refuse.

    An expanded checkpoint for a compact model is contracted in memory. A compact checkpoint for
    an expanded model is factorised by the units while it is loaded; where the rate makes that
    impossible, the model is contracted to test it, and training is refused.

    Args:
        model: the model that is about to load it.
        checkpoint: changed in place.
        training: whether the model is to be trained further.
        resume: whether optimizer states are loaded too; then both must be of one kind.

    Raises:
        CheckpointError: naming the first layer that does not fit, and what to do.
    """
    state_dict = get_state_dict(checkpoint)
    if state_dict and all(key.startswith('module.') for key in state_dict):
        state_dict = {key.removeprefix('module.'): value for key, value in state_dict.items()}
        _replace_state_dict(checkpoint, state_dict)
    if not hasattr(model, DISTILL_LOSSES):
        _drop_distill_losses(state_dict, resume)
    _check_nonlinear(model, checkpoint, starts=training and not resume)
    expanded = is_expanded_state_dict(state_dict)
    if expanded and training and not resume and _other_units(model, state_dict):
        # Of another rate or block: it starts this model as the compact network would.
        state_dict = contract_state_dict(state_dict)
        _replace_state_dict(checkpoint, state_dict)
        expanded = False
    if resume and expanded != is_expanded(model):
        raise CheckpointError(_cannot_resume(expanded))
    if expanded and not is_expanded(model):
        _replace_state_dict(checkpoint, contract_state_dict(state_dict))
    elif expanded:
        _check_same_units(model, state_dict)
    elif is_expanded(model):
        refusal = _factorise_refusal(model, state_dict)
        if refusal and training:
            raise CheckpointError(
                f'a compact checkpoint cannot start this expanded model: {refusal}; or do without '
                'load_from'
            )
        if refusal:
            contract_(model)
    if resume or not training:
        # Fine-tuning from a checkpoint with other classes is common, testing with it is not.
        check_shapes(model, checkpoint)


def _cannot_resume(expanded: bool) -> str:
    if expanded:
        return (
            'the checkpoint is of an expanded model, the config expands nothing: resume with the '
            'config it was trained with (ExpandHook or ExpandModel), or contract it with '
            'tools/contract.py and set load_from'
        )
    return (
        'the checkpoint is of a compact model, the config expands: optimizer states do not fit, '
        'so it cannot be resumed; start from its weights with load_from, or go on from there with '
        'ExpandHook(warm_start=True)'
    )


def nonlinear_layers(checkpoint: Mapping) -> set[str]:
    """The layers of a checkpoint that have ReLU between their factors."""
    layers = checkpoint.get('meta', {}).get(META_KEY, {}).get('layers', {})
    return {name for name, layer in layers.items() if layer['method'].endswith('_relu')}


def _check_nonlinear(model: nn.Module, checkpoint: Mapping, starts: bool) -> None:
    """What was trained with ReLU between factors may start a linear chain, and is no other."""
    theirs = nonlinear_layers(checkpoint)
    ours = {name for name, unit in named_units(model).items() if not unit.has_kernel}
    if starts and theirs:
        wrong = theirs if _other_units(model, get_state_dict(checkpoint)) else set()
    else:
        wrong = set() if starts else theirs ^ ours
    if wrong:
        raise CheckpointError(
            f"{min(wrong)} has ReLU between its factors (nonlinear='relu') in the "
            f'{"checkpoint" if theirs else "model"}, which is no convolution and no linear chain: '
            'use the config that the checkpoint was trained with, or, to start a linear training '
            'from it, the same method, rate and include with load_from'
        )


def _drop_distill_losses(state_dict: dict, resume: bool) -> None:
    losses = [key for key in state_dict if key.startswith(f'{DISTILL_LOSSES}.')]
    if losses and resume:
        raise CheckpointError(
            f"the checkpoint holds {losses[0]}, which was trained with a teacher's loss, and the "
            'config has none: resume with the DistillHook that it was trained with, or start from '
            'its weights with load_from'
        )
    for key in losses:
        del state_dict[key]


def _replace_state_dict(checkpoint: dict, state_dict: Mapping) -> None:
    if 'state_dict' in checkpoint:
        checkpoint['state_dict'] = state_dict
    else:
        checkpoint.clear()
        checkpoint.update(state_dict)


def _other_units(model: nn.Module, state_dict: Mapping) -> bool:
    try:
        _check_same_units(model, state_dict)
    except CheckpointError:
        return True
    return False


def _check_same_units(model: nn.Module, state_dict: Mapping) -> None:
    # A state dict has every name of a layer that is shared.
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
        reason = kernel_refusal(unit.expression)
        if reason and f'{name}.weight' in state_dict:
            return f'{name}, method {unit.method!r}, rate {unit.rate}: {reason}'
    return ''


def check_shapes(model: nn.Module, checkpoint: Mapping) -> None:
    """Refuse a checkpoint that lacks parameters of a model, or has others.

    Raises:
        CheckpointError: naming the first one.
    """
    state_dict = get_state_dict(checkpoint)
    found = {key.removeprefix('module.') for key in state_dict}
    missing = [key for key in _parameter_names(model, state_dict) if key not in found]
    if missing:
        raise CheckpointError(
            f'the checkpoint lacks {len(missing)} of the parameters of {type(model).__name__}, '
            f'{missing[0]} first; it is of another network (its keys are like '
            f'{next(iter(state_dict), "(none)")!r})'
        )
    for key, value in model.state_dict().items():
        given = state_dict.get(key, value)
        if given.shape != value.shape:
            raise CheckpointError(
                f'{key} has shape {tuple(given.shape)} in the checkpoint and {tuple(value.shape)} '
                f'in the model{_classes(checkpoint)}'
            )


def _parameter_names(model: nn.Module, state_dict: Mapping) -> list[str]:
    """What a checkpoint must hold for this model; of a unit, factors or the compact weight."""
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
        return '; it is of another network'
    shown = ', '.join(map(str, classes[:5])) + (', ...' if len(classes) > 5 else '')
    return (
        f'; it was trained on {len(classes)} classes ({shown}): set num_classes and the '
        "data set's metainfo accordingly"
    )
