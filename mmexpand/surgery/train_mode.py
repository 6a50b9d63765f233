"""Contexts that restore a model's train and eval modes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def kept_train_mode(model: nn.Module) -> Iterator[None]:
    """Restore the train or eval mode of every module after this context."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode in this context, then restore the modes of its modules."""
    with kept_train_mode(model):
        model.eval()  # Do not use its result: mmseg's UNet.train returns nothing.
        yield
