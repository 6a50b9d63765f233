"""References to layers and parameters outside a model's tree of modules, in lists and caches."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..core.compat import tree_leaves

CACHES: dict[type, Callable[[nn.Module], None]] = {}
"""Classes that cache parameters of their submodules, each with a function that updates the cache.
Layers for a framework add its classes."""

_TREE = frozenset(vars(nn.Module()))


def replace_references(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Replace layers in plain lists, tuples, dicts and caches after replacing them in the tree.

    Args:
        model: the model with the new layers in its tree of modules.
        replaced: the new layers by the old layers.
    """
    for module in model.modules():
        for name, value in _outside_the_tree(module):
            vars(module)[name] = _replaced(value, replaced)
        for kind, refresh in CACHES.items():
            if isinstance(module, kind):
                refresh(module)


def referenced_parameters(model: nn.Module) -> dict[int, str]:
    """Return the places of parameters that a model holds outside its tree of modules, by id."""
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, tuple(CACHES)):
            continue
        for name, value in _outside_the_tree(module):
            place = f'{prefix}.{name}'.lstrip('.')
            parameters = (v for v in tree_leaves(value) if isinstance(v, nn.Parameter))
            found.update((id(parameter), place) for parameter in parameters)
    return found


def _outside_the_tree(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(module).items() if name not in _TREE]


def _replaced(value: Any, replaced: Mapping[nn.Module, nn.Module]) -> Any:
    if isinstance(value, nn.Module):
        return replaced.get(value, value)
    if not isinstance(value, (list, dict, tuple)):
        return value
    keys = list(value) if isinstance(value, dict) else range(len(value))
    new = {key: _replaced(value[key], replaced) for key in keys}
    new = {key: item for key, item in new.items() if item is not value[key]}
    if not new:
        return value  # Some classes cannot be changed or built again.
    if isinstance(value, tuple):
        items = [new.get(index, item) for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, '_fields') else type(value)(items)
    for key, item in new.items():
        value[key] = item
    return value
