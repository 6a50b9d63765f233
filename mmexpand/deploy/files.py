"""What every exporter does around its work."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, then in the modes that its modules had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A temporary file beside ``out``, which takes its place if nothing is raised."""
    temporary = out.with_name(f'.{os.getpid()}.{out.name}')
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
