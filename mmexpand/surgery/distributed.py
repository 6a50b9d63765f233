"""Compact-size gradients in distributed training: DDP reduces gradients of folded kernels."""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.compat import parameters_of, tree_leaves
from ..core.folded_parameter import FoldedParameter
from .compat import call_after_backward, ignore, ignore_no_more
from .expand import ExpandedLayer, named_units


def can_reduce_compact(model: nn.Module) -> bool:
    """Return whether a model has linear units, none of them with ``forward='layerwise'``."""
    units = _linear_units(model).values()
    return bool(units) and all(unit.forward_order != 'layerwise' for unit in units)


def _linear_units(model: nn.Module) -> dict[str, ExpandedLayer]:
    """Return the units with a kernel while training; DDP treats others like any module."""
    return {name: unit for name, unit in named_units(model).items() if unit.is_linear}


def reduce_compact(
    model: nn.Module, wrap: Callable[[nn.Module], DistributedDataParallel]
) -> DistributedDataParallel:
    """Wrap an expanded model so that DDP reduces compact-size gradients.

    DDP sees the folded kernels instead of the factors: buckets, their overlap with the backward
    pass, ``no_sync``, unused parameters and static graphs work with them as with any parameter.
    The factors get their gradients after the reduction. Optimizer and state dict know the factors
    only.

    Args:
        model: a model whose linear units can all run folded (see ``can_reduce_compact``).
        wrap: builds the DDP wrapper of the model.

    Returns:
        The wrapper, with the factors of rank 0 on all ranks.
    """
    units = _linear_units(model)
    trained = {n: u for n, u in units.items() if any(p.requires_grad for p in u.parameters())}
    # Buffers of linear units are constants: a broadcast would mark them as changed in every step.
    inside = [
        f'{name}.{key}'
        for name, unit in units.items()
        for key, _ in chain(unit.named_parameters(), unit.named_buffers())
    ]
    ignore(model, inside)
    for unit in trained.values():
        unit.folded_parameter = FoldedParameter(unit.kernel, unit.take_offered)
        # Registered only while DDP looks for parameters.
        for index, folded in enumerate(unit.folded_parameter.parameters):
            unit.register_parameter(f'folded_{index}', folded)
    try:
        wrapper = wrap(model)
    finally:
        for unit in trained.values():
            own = parameters_of(unit)
            for name in [key for key in own if key.startswith('folded_')]:
                del own[name]
    for parameter in chain.from_iterable(unit.parameters() for unit in units.values()):
        torch.distributed.broadcast(parameter.data, 0, group=wrapper.process_group)
    wrapper.delivery = _Delivery(wrapper, [unit.folded_parameter for unit in trained.values()])
    return wrapper


def release(wrapper: nn.Module) -> nn.Module:
    """Undo ``reduce_compact`` and return the model, which can be wrapped again."""
    model = wrapper.module
    delivery = getattr(wrapper, 'delivery', None)
    if delivery is None:
        return model
    delivery.remove()
    inside = {}
    for name, unit in _linear_units(model).items():
        unit.folded_parameter = None
        for key, value in chain(unit.named_parameters(), unit.named_buffers()):
            inside[f'{name}.{key}'] = value
    ignore_no_more(model, inside)
    return model


class _Delivery:
    """Delivery of gradients to the factors after DDP's reduction in a backward pass."""

    def __init__(self, wrapper: DistributedDataParallel, folded_parameters: list[FoldedParameter]):
        self._folded = folded_parameters
        self._sync = True
        self._queued = False
        self._handles = [
            wrapper.register_forward_pre_hook(self._before_forward),
            wrapper.register_forward_hook(self._after_forward),
        ]
        # For outputs in which no tensor is found. Any parameter that DDP sees may be the only
        # parameter that this rank has used.
        units = _linear_units(wrapper.module).values()
        factors = set(chain.from_iterable(unit.parameters() for unit in units))
        others = set(wrapper.module.parameters()) - factors
        for parameter in chain(others, *(folded.parameters for folded in folded_parameters)):
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(self._begin)
                self._handles.append(hook)

    def remove(self) -> None:
        """Stop delivering gradients."""
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, wrapper: DistributedDataParallel, _: tuple) -> None:
        # As in DDP, the forward pass decides whether its backward pass is reduced.
        if torch.is_grad_enabled():
            self._sync = wrapper.require_backward_grad_sync
            self._queued = False  # It is still True after an error in the backward pass.
            # Not at a layer's first use, which may be inside activation checkpointing: its second
            # forward pass must do the same as the first.
            for folded in self._folded:
                folded.refresh()

    def _after_forward(self, _: nn.Module, __: tuple, output: object) -> None:
        # The backward pass of a reentrant checkpoint ends before DDP's reduction. The gradient of
        # an output is computed in the backward pass around it.
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(self._begin)

    def _begin(self, _: Tensor) -> None:
        if self._sync and not self._queued:
            self._queued = True
            call_after_backward(self._requeue)

    def _requeue(self) -> None:
        # Callbacks run in the order of queueing: DDP's last callback is queued by now, so that
        # this one runs after it.
        call_after_backward(self._deliver)

    def _deliver(self) -> None:
        self._queued = False
        for folded in self._folded:
            folded.deliver()
