"""Modes of a model that is only looked at."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def kept_train_mode(model: nn.Module) -> Iterator[None]:
    """The model in whatever mode it is put, then in the modes that its modules had."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, then in the modes that its modules had."""
    with kept_train_mode(model):
        model.eval()  # mmseg's UNet.train returns nothing.
        yield
