"""Deep copies of models in use, which may hold outputs and replaced forward methods."""

import copy
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model that computes with its own weights.

    torch refuses to copy tensors with a history; those in a module (``self.last = x``) are copied
    without it. If a function replaces a method of a module, as activation checkpointing replaces
    ``forward``, the copied function calls the copy and not the original.

    Args:
        model: any model; it is not changed.
    """
    memo: dict[int, Any] = {
        id(tensor): tensor.detach().clone() for tensor in _tensors(model) if not tensor.is_leaf
    }
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for name, value in vars(module).items():
            if isinstance(value, FunctionType):
                vars(module)[name] = _rebind(value, memo)
    return copied


def _tensors(root: Any) -> Iterator[Tensor]:
    """Yield all tensors that a deep copy would reach."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (str, bytes, int, float, type)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        else:
            waiting += getattr(value, '__dict__', {}).values()


def _rebind(value: Any, memo: dict[int, Any]) -> Any:
    """Return a method or function with the original's modules replaced by the copy's."""
    if isinstance(value, MethodType):
        return MethodType(value.__func__, memo.get(id(value.__self__), value.__self__))
    if isinstance(value, nn.Module) or id(value) in memo:
        return memo.get(id(value), value)
    if not isinstance(value, FunctionType):
        return value
    cells = tuple(CellType() for _ in value.__closure__ or ())
    bound = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
    memo[id(value)] = bound  # A function may refer to itself.
    for cell, original in zip(cells, value.__closure__ or (), strict=True):
        cell.cell_contents = _rebind(original.cell_contents, memo)
    bound.__defaults__ = tuple(_rebind(v, memo) for v in value.__defaults__ or ()) or None
    bound.__kwdefaults__ = {k: _rebind(v, memo) for k, v in (value.__kwdefaults__ or {}).items()}
    if _held(bound) == _held(value):
        memo[id(value)] = value  # Such as F.relu, which must stay itself to be pickled.
        return value
    bound.__dict__.update(value.__dict__)
    bound.__qualname__ = value.__qualname__
    return bound


def _held(function: FunctionType) -> list[int]:
    """Return the objects that a function refers to, by id."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [id(value) for value in (*cells, *defaults)]
