"""Replay of one run's selections by score in another run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FUNCTIONS = ('topk', 'sort', 'argsort', 'argmax', 'argmin', 'max', 'min')
_SELECTING = {getattr(owner, name) for owner in (torch, Tensor) for name in _FUNCTIONS}


class TopkReplay(TorchFunctionMode):
    """A context that records selections by score and makes another run select the same.

    Two models that are equal up to rounding may choose differently between near ties, and their
    later outputs then differ. As a context it records indices; in the context ``repeated``, a run
    gets the recorded indices with its own values.

    Attributes:
        scores: pairs of scores of the recorded run and of the repeating run.
    """

    def __init__(self):
        super().__init__()
        self.scores: list[tuple[Tensor, Tensor]] = []
        self._recorded: list[tuple[Tensor, Tensor]] = []
        self._repeating: Iterator[tuple[Tensor, Tensor]] | None = None

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Replace selections in this context by the recorded ones, as long as shapes agree."""
        self._repeating = iter(self._recorded)
        with self:
            yield

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run a function; record the indices of a selection, or replace them by recorded ones."""
        result = func(*args, **(kwargs or {}))
        if func not in _SELECTING or not args or not args[0].is_floating_point():
            return result
        indices = result[1] if isinstance(result, tuple) else result
        if indices.is_floating_point():
            return result
        if self._repeating is None:
            self._recorded.append((args[0].clone(), indices))
            return result
        scores, recorded = next(self._repeating, (None, None))
        if scores is None or scores.shape != args[0].shape or recorded.shape != indices.shape:
            return result
        self.scores.append((scores, args[0].clone()))
        if not isinstance(result, tuple):
            return recorded
        position = 2 if 'topk' in func.__name__ else 1
        dim = args[position] if len(args) > position else (kwargs or {}).get('dim', -1)
        return type(result)((_take(args[0], recorded, dim), recorded))


def _take(scores: Tensor, indices: Tensor, dim: int) -> Tensor:
    if indices.dim() == scores.dim():
        return scores.gather(dim, indices)
    return scores.gather(dim, indices.unsqueeze(dim)).squeeze(dim)
