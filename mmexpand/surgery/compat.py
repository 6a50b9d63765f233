"""Access to private parts of torch, each with its version; tests fail when one changes."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

IGNORED = '_ddp_params_and_buffers_to_ignore'
"""The attribute of a model that names parameters and buffers that DDP ignores (torch 2.9.1)."""

REBUILD = {
    ('torch._utils', name): getattr(torch._utils, name)
    for name in ('_rebuild_tensor_v2', '_rebuild_parameter')
}
"""The functions of a checkpoint that build its tensors, by module and name (torch 2.9.1)."""


def call_after_backward(callback: Callable[[], None]) -> None:
    """Call a function at the end of the running backward pass (torch 2.9.1).

    Callbacks run in the order of queueing, including callbacks that are queued by callbacks.
    """
    Variable._execution_engine.queue_callback(callback)


def tf32_switches() -> list[tuple[Any, str, bool | str]]:
    """Return holder, attribute and value to turn TF32 off, of each setting (torch 2.9.1).

    torch has two interfaces. Reading the older one is an error once the newer one was used.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    older = [(matmul, 'allow_tf32', False), (cudnn, 'allow_tf32', False)]
    try:
        for holder, name, _ in older:
            getattr(holder, name)
    except RuntimeError:
        return [(matmul, 'fp32_precision', 'ieee'), (cudnn.conv, 'fp32_precision', 'ieee')]
    return older


def ignored(model: nn.Module) -> list[str]:
    """Return the names of parameters and buffers that DDP ignores."""
    return list(getattr(model, IGNORED, []))


def ignore(model: nn.Module, names: Iterable[str]) -> None:
    """Let DDP also ignore the parameters and buffers of these names (torch 2.9.1)."""
    names = [*ignored(model), *names]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def ignore_no_more(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Undo ``ignore`` for parameters and buffers by name (torch 2.9.1)."""
    for value in tensors.values():
        value._ddp_ignored = False
    setattr(model, IGNORED, [name for name in ignored(model) if name not in tensors])


def copy_versions(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Copy the versions of modules from one state dict to another (torch 2.9.1).

    A module may convert the weights of an earlier version, or of none, while it loads them.
    """
    if hasattr(old, '_metadata'):
        new._metadata = old._metadata


def put_module(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule without calling the parent's ``__setattr__`` (torch 2.9.1)."""
    parent._modules[name] = module


def carry_over_hooks(old: nn.Module, new: nn.Module) -> None:
    """Copy the hooks of a module to another module (torch 2.9.1)."""
    for attribute, value in vars(old).items():
        if attribute.startswith(('_forward_', '_backward_')) and isinstance(value, dict):
            vars(new)[attribute] = value.copy()
    new._is_full_backward_hook = old._is_full_backward_hook
