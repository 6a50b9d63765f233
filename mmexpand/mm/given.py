"""Detection of given weights: building the model again gives the same weights."""

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

    The module is built a second time with another random state. Equal weights count as given: they
    are loaded, constant, or drawn with a fixed seed. So do layers that the second module lacks.
    The second module is freed, and random states are restored.

    Args:
        module: a module as its constructor returned it.
        build: builds the module again.

    Returns:
        The names, or None if the module cannot be built again.
    """
    try:
        with random_state_kept():
            torch.seed()
            np.random.seed()
            random.seed()
            again = build()
    except Exception as error:
        log(
            "init='auto' takes all weights as given: the model cannot be built a second time for "
            f'a comparison ({describe(error)})',
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
