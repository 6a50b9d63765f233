"""Modes of a model that is only looked at."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, then in the modes that its modules had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()  # mmseg's UNet.train returns nothing.
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
