"""Warm start: a compact training continues expanded, with its schedule and momentum."""

import logging
from itertools import chain

import torch
from mmengine.runner import Runner
from torch import Tensor, nn

from ..core.algebra import as_kernel
from ..core.expanded_layer import ExpandedLayer
from ..surgery.checkpoint import CheckpointError, get_state_dict
from .checkpoints import check_shapes, match_checkpoint, unwrap
from .logs import log
from .optim import ExpandOptimWrapperConstructor, by_layer, stand_ins
from .wrapped_optimizers import keeps_own_groups

MOMENTUM = 'momentum_buffer'
"""The key of SGD's state of a parameter."""


class CompactOptimizer:
    """The optimizer state of a compact training, kept until the expanded model's optimizer exists.

    Args:
        model: the expanded model without a wrapper; it loads the checkpoint's weights.
        checkpoint: checkpoint of the compact training. It is changed in place to one of the
            expanded training, without the optimizer's state.

    Raises:
        CheckpointError: if the checkpoint does not fit the model.
    """

    def __init__(self, model: nn.Module, checkpoint: dict):
        averaged = checkpoint.pop('ema_state_dict', None)
        if averaged is not None:
            log('Warm start: the moving average starts again, from the current weights')
            # EMAHook saves the average as state_dict, and the trained weights as ema_state_dict.
            trained = {k.removeprefix('module.'): v for k, v in averaged.items() if k != 'steps'}
            checkpoint['state_dict'] = {**checkpoint['state_dict'], **trained}
        match_checkpoint(model, checkpoint, 'start')
        check_shapes(model, checkpoint)
        model.load_state_dict(get_state_dict(checkpoint), strict=False)
        checkpoint['state_dict'] = model.state_dict()
        self._state = checkpoint.pop('optimizer', None)
        states = checkpoint.get('param_schedulers', [])
        for scheduler in chain(*(states.values() if isinstance(states, dict) else [states])):
            # The optimizer may have more groups now, from which the schedulers take their rates.
            scheduler.pop('base_values', None)
            scheduler.pop('_last_value', None)

    def carry_over(self, runner: Runner) -> None:
        """Give the expanded model's optimizer the compact training's learning rates and momentum.

        A kernel W with momentum M has factors F whose momentum becomes (dW / dF)^T M, as if they
        had been trained from the start. As long as the other factors stay as 'preserve' set them,
        the kernel moves exactly as in the compact training. For optimizers other than SGD, the
        states of expanded layers start empty.

        Args:
            runner: a Runner with loaded weights.
        """
        if self._state is None:
            return
        model = unwrap(runner.model)
        optimizer = runner.optim_wrapper.optimizer
        constructor = ExpandOptimWrapperConstructor(**_arguments(runner.cfg.optim_wrapper))
        kept, ratios = self._by_name(constructor.compact_names(model))
        own_groups = keeps_own_groups(optimizer)
        other_kind = _kind(self._state['param_groups'][0]) != _kind(optimizer.param_groups[0])
        if own_groups or other_kind:
            kept = {}
        ratio_of = {}
        for name, parts in stand_ins(model).items():
            ratio_of.update((id(part.parameter), ratios.get(name, 1.0)) for part in parts)
            if len(parts) == 1 and parts[0].unit is None and kept.get(name):
                _set(optimizer, parts[0].parameter, kept[name])
        for group in optimizer.param_groups:
            group['lr'] = group.get('initial_lr', group['lr']) * ratio_of[id(group['params'][0])]
        if own_groups:
            log(
                f'Warm start: the compact training continues expanded. {type(optimizer).__name__} '
                'starts without its state, since it wraps another optimizer',
                logging.WARNING,
            )
        elif _carry_momentum(model, optimizer, kept):
            log('Warm start: the compact training continues expanded, with its momentum')
        else:
            log(
                f'Warm start: the compact training continues expanded. {type(optimizer).__name__} '
                "starts without the state of expanded layers, since only SGD's momentum has an "
                'equivalent in factors',
                logging.WARNING,
            )

    def _by_name(self, names: list[list[str]]) -> tuple[dict[str, dict], dict[str, float]]:
        """Return the states, and the learning rates relative to the initial ones, by name.

        Args:
            names: the names of the compact network's parameters, by group of the optimizer.

        Raises:
            CheckpointError: if the groups of the checkpoint have other sizes.
        """
        groups = self._state['param_groups']
        if [len(group['params']) for group in groups] != [len(held) for held in names]:
            raise CheckpointError(
                f'the optimizer of the checkpoint has {len(groups)} parameter groups that differ '
                f'from the {len(names)} of the config: use the paramwise_cfg of that training'
            )
        kept, ratios = {}, {}
        for group, held in zip(groups, names, strict=True):
            ratio = group['lr'] / (group.get('initial_lr') or group['lr'] or 1)
            for index, name in zip(group['params'], held, strict=True):
                kept[name], ratios[name] = self._state['state'].get(index, {}), ratio
        return kept, ratios


def _kind(group: dict) -> set[str]:
    """Return options that tell optimizers with different states apart."""
    return {'momentum', 'betas', 'alpha', 'rho'} & group.keys()


def _arguments(optim_wrapper: dict) -> dict:
    cfg = by_layer(optim_wrapper)
    cfg.pop('constructor')
    return dict(paramwise_cfg=cfg.pop('paramwise_cfg', None), optim_wrapper_cfg=cfg)


def _carry_momentum(
    model: nn.Module, optimizer: torch.optim.Optimizer, kept: dict[str, dict]
) -> bool:
    """Give factors their momentum; return whether expanded layers had no other state."""
    whole = True
    for name, unit in model.named_modules():
        if isinstance(unit, ExpandedLayer):
            states = [kept.get(f'{name}.{kind}', {}) for kind in ('weight', 'bias')]
            whole = whole and all(state.keys() <= {MOMENTUM} for state in states)
            momenta = [state.get(MOMENTUM) for state in states]
            for parameter, momentum in pulled_back(unit, *momenta).items():
                _set(optimizer, parameter, {MOMENTUM: momentum})
    return whole


def pulled_back(
    unit: ExpandedLayer, weight: Tensor | None, bias: Tensor | None
) -> dict[nn.Parameter, Tensor]:
    """Return the gradients of a unit's factors for gradients of its kernel and bias.

    Args:
        unit: the unit, with any number of factors.
        weight: gradient in the shape of the layer's weight, or None.
        bias: gradient in the shape of the layer's bias, or None.
    """
    if weight is None and bias is None:
        return {}
    return unit.kernel.pull_back(None if weight is None else as_kernel(weight), bias)


def _set(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict) -> None:
    optimizer.state[parameter] = {
        key: value.detach().to(parameter.device).clone() if isinstance(value, Tensor) else value
        for key, value in state.items()
    }
