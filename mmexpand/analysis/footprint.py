"""Memory and traffic of a training step: bytes saved for backward, reduced, and resident."""

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.compat import tree_leaves
from ..errors import UserError
from ..surgery import named_units


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that a forward pass keeps for backward, besides parameters and buffers.

    Attributes:
        activations: bytes of tensors computed from the input, the input included.
        folding: bytes of tensors computed from parameters alone: folded kernels. Products that a
            fold keeps for its own gradient are not seen; they are part of the peak memory.
    """

    activations: int
    folding: int


def saved_bytes(
    model: nn.Module, images: Tensor, forward: Callable[[nn.Module, Tensor], Any]
) -> tuple[SavedBytes, Any]:
    """Count the bytes that a forward pass saves for backward.

    A storage that the graph holds after the forward pass counts once and whole, even if several
    operations save it or views of it. Parameters and buffers do not count, since the model holds
    them anyway.

    The result of an operation is an activation if the input or an activation is an argument of the
    operation; other saved tensors are folded kernels. A compact network saves no folded kernel.

    Args:
        model: a model in training mode.
        images: the input.
        forward: runs the model on it.

    Returns:
        The bytes, and what ``forward`` returned.
    """
    held = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[StorageWeakRef, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
        # A saved output of the same operation would keep the graph alive.
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor), _FromInput(images) as seen:
        output = forward(model, images)
    alive = {ref: size for ref, size in saved.items() if ref not in held and not ref.expired()}
    activations = sum(size for ref, size in alive.items() if ref in seen.storages)
    return SavedBytes(activations, sum(alive.values()) - activations), output


class _FromInput(TorchDispatchMode):
    """Mode that records the storages of all tensors that are computed from the input."""

    def __init__(self, images: Tensor):
        super().__init__()
        self.storages = {_storage(images)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        output = func(*args, **(kwargs or {}))
        if any(_storage(tensor) in self.storages for tensor in tensors_in((args, kwargs))):
            self.storages.update(_storage(tensor) for tensor in tensors_in(output))
        return output


def _storage(tensor: Tensor) -> StorageWeakRef:
    # Weak references: the address of a freed storage is used again.
    return StorageWeakRef(tensor.untyped_storage())


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in any nesting of lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class ReducedBytes:
    """Bytes of gradients that each process passes to all-reduce in one step.

    A ring of N processes sends 2 (N - 1) / N times as much from each.

    Attributes:
        ddp: bytes with plain DistributedDataParallel, which reduces all parameters' gradients.
        compact_size: bytes if the gradients of folded kernels are reduced.
    """

    ddp: int
    compact_size: int


def reduced_bytes(model: nn.Module, compact: nn.Module, folded: Collection[str]) -> ReducedBytes:
    """Count the bytes of gradients that distributed training reduces in one step.

    Args:
        model: compact or expanded.
        compact: the model that it was expanded from.
        folded: names of the units that are run folded, whose kernel's gradient replaces those of
            the factors.
    """
    ddp = compact_size = trained_bytes(model.parameters())
    for name, unit in named_units(model).items():
        if name in folded:
            layer = compact.get_submodule(name)
            compact_size += trained_bytes(layer.parameters()) - trained_bytes(unit.parameters())
    return ReducedBytes(ddp, compact_size)


def trained_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of the trained parameters."""
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


HAND_BACK = {'MALLOC_MMAP_THRESHOLD_': str(2**17)}
"""Environment in which the C library maps each block of 128 KiB or more, its initial threshold,
and unmaps it when it is freed."""


class OutOfMemoryError(UserError, RuntimeError):
    """A process was killed before its end, as a system short of memory does."""


def peak_memory(train: Callable[..., None], *args: Any, threads: int, device: str = 'cpu') -> int:
    """Return the peak memory of a training run, in bytes.

    On a GPU this is PyTorch's peak allocation above its allocation before. On a CPU it is the
    resident memory of a separate process: the high-water mark after ``train``, less the mark before
    it, when the libraries are loaded and a first convolution has run. It covers parameters,
    gradients, optimizer state, activations and scratch memory. The C library returns large blocks
    at once; by default it keeps a random part of them, up to 40 % between equal runs.

    Args:
        train: an importable function that builds a model and trains it for a few steps.
        *args: its arguments; they are pickled.
        threads: as in ``torch.set_num_threads``.
        device: the device of the training.

    Raises:
        OutOfMemoryError: if the process was killed, or the GPU ran out of memory.
    """
    if torch.device(device).type == 'cuda':
        return _allocated_peak(train, args, device)
    # A server with the libraries loaded, which forks each process.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['mmexpand'])
    in_environment = mock.patch.dict(os.environ, HAND_BACK)
    with in_environment, ProcessPoolExecutor(1, mp_context=context) as executor:
        try:
            return executor.submit(_peak_of, train, args, threads).result()
        except BrokenProcessPool:
            raise OutOfMemoryError(
                'the process was killed, probably out of memory; use a smaller input or rate'
            ) from None


def _allocated_peak(train: Callable[..., None], args: tuple, device: str) -> int:
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        train(*args)
    except torch.OutOfMemoryError:
        raise OutOfMemoryError(
            f'the memory of {device} does not suffice; use a smaller input or rate'
        ) from None
    return torch.cuda.max_memory_allocated(device) - before


def _peak_of(train: Callable[..., None], args: tuple, threads: int) -> int:
    torch.set_num_threads(threads)
    kernel = torch.ones(8, 3, 3, 3, requires_grad=True)
    F.conv2d(torch.ones(1, 3, 64, 64), kernel).sum().backward()
    before = resident_peak()
    train(*args)
    return resident_peak() - before


def resident_peak() -> int:
    """Return the most memory that this process has held, in bytes.

    Raises:
        ModuleNotFoundError: on Windows, which has no such counter.
    """
    import resource  # Not on Windows.

    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
