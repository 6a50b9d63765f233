"""Weights that a constructor gives: building the model again gives the same."""

import logging
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .logs import log
from .random_state import random_state_kept
from .ranks import describe


def given_layers(module: nn.Module, build: Callable[[], nn.Module]) -> set[str] | None:
    """Return the names of the layers whose weights the constructor gives.

    The module is built a second time under another random state. Equal weights were given: loaded,
    drawn with a seed of the constructor's own, or constant. A layer that the second module lacks
    counts as given. The second module is freed, and random states are kept.

    Args:
        module: as its constructor left it.
        build: builds it again.

    Returns:
        The names; None if it cannot be built again.
    """
    try:
        with random_state_kept():
            torch.seed()
            np.random.seed()
            random.seed()
            again = build()
    except Exception as error:
        log(
            "init='auto' takes all weights as given: the model cannot be built a second time to "
            f'compare ({describe(error)})',
            logging.WARNING,
        )
        return None
    ours, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (module, again))
    return {
        name.removesuffix('.weight')
        for name, weight in ours.items()
        if name.endswith('.weight')
        and not is_lazy(weight)
        and (name not in theirs or torch.equal(weight, theirs[name].to(weight)))
    }
