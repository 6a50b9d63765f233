"""A copy of a model that is in use: outputs it keeps and replaced forwards are no obstacle."""

import copy
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy that computes with its own weights, whatever was done to the model.

    Tensors with a history that a module keeps (``self.last = x``), which torch refuses to copy,
    are copied without it. A function that was set on a module in the place of a method, as
    activation checkpointing does with ``forward``, calls the copy and not the original.

    Args:
        model: any model; it is left as it was.
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
    """All tensors that a deep copy would come across."""
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
    """A method of the original as the copy's; in a function, whatever of them it closes over."""
    if isinstance(value, MethodType):
        return MethodType(value.__func__, memo.get(id(value.__self__), value.__self__))
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if not isinstance(value, FunctionType) or value.__closure__ is None:
        return value
    cells = tuple(CellType(_rebind(cell.cell_contents, memo)) for cell in value.__closure__)
    bound = FunctionType(
        value.__code__, value.__globals__, value.__name__, value.__defaults__, cells
    )
    bound.__kwdefaults__ = value.__kwdefaults__
    return bound
