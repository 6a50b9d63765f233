"""Optimizers that hold another optimizer, which has parameter groups of its own."""

import copy
from collections.abc import Mapping

from mmengine.registry import OPTIMIZERS
from torch.optim import Optimizer

from ..errors import UserValueError


def keeps_own_groups(optimizer: Optimizer) -> bool:
    """Return whether an optimizer steps by another one, with other parameter groups.

    What is changed in its own groups, as a parameter that is exchanged, does not reach those.
    """
    ours = {id(group) for group in optimizer.param_groups}
    inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    return any(id(group) not in ours for other in inner for group in other.param_groups)


def built_again(optimizer: Optimizer, cfg: Mapping | None) -> Optimizer:
    """Return an optimizer built on the parameter groups that another one has now.

    Args:
        optimizer: its groups were changed after it was built.
        cfg: what it was built from; None where that is not known.

    Raises:
        ValueError: if that fails.
    """
    groups = [dict(group) for group in optimizer.param_groups]
    try:
        if cfg is None:
            raise TypeError('its config is not the optimizer of an optim_wrapper')
        return OPTIMIZERS.build({**copy.deepcopy(dict(cfg)), 'params': groups})
    except Exception as error:
        raise UserValueError(
            f'{type(optimizer).__name__} keeps an optimizer of its own, which cannot be built on '
            f'the factors of expanded layers ({type(error).__name__}: {error}): use another '
            'optimizer'
        ) from error


def check_given(optimizer: Optimizer) -> None:
    """Refuse an optimizer object that cannot take up the factors.

    Raises:
        ValueError: naming its class.
    """
    if keeps_own_groups(optimizer):
        raise UserValueError(
            f'{type(optimizer).__name__} keeps an optimizer of its own, which holds the parameters '
            'of the compact network: give the Runner a config of it, '
            f'optim_wrapper=dict(optimizer=dict(type={type(optimizer).__name__!r}, ...))'
        )
