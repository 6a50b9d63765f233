"""Optimizers that wrap another optimizer with parameter groups of its own."""

import copy
from collections.abc import Mapping

from mmengine.registry import OPTIMIZERS
from torch.optim import Optimizer

from ..errors import UserValueError


def keeps_own_groups(optimizer: Optimizer) -> bool:
    """Return whether an optimizer wraps an optimizer with other parameter groups.

    Changes of the outer groups, such as replaced parameters, do not reach the inner groups.
    """
    ours = {id(group) for group in optimizer.param_groups}
    inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    return any(id(group) not in ours for other in inner for group in other.param_groups)


def built_again(optimizer: Optimizer, cfg: Mapping | None) -> Optimizer:
    """Build an optimizer again on its current parameter groups.

    Args:
        optimizer: an optimizer whose groups were changed after it was built.
        cfg: its config; None if it is unknown.

    Raises:
        ValueError: if the optimizer cannot be built.
    """
    groups = [dict(group) for group in optimizer.param_groups]
    try:
        if cfg is None:
            raise TypeError('its config is not the optimizer of an optim_wrapper')
        return OPTIMIZERS.build({**copy.deepcopy(dict(cfg)), 'params': groups})
    except Exception as error:
        raise UserValueError(
            f'{type(optimizer).__name__} wraps an optimizer that cannot be built on the factors of '
            f'expanded layers ({type(error).__name__}: {error}): use another optimizer'
        ) from error


def check_given(optimizer: Optimizer) -> None:
    """Raise ValueError if an optimizer object cannot get the factors as parameters."""
    if keeps_own_groups(optimizer):
        raise UserValueError(
            f'{type(optimizer).__name__} wraps an optimizer that holds the compact parameters: '
            'give the Runner its config, '
            f'optim_wrapper=dict(optimizer=dict(type={type(optimizer).__name__!r}, ...))'
        )
