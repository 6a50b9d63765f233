"""Gradient clipping by the gradients of the compact network."""

import torch
from mmengine.dist import get_world_size
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ..core.compat import multiply_all
from ..core.expanded_layer import ExpandedLayer
from ..surgery import named_units
from .compat import clips_as_mmengine, set_clip

EPS = 1e-6
"""Added to the norm by ``torch.nn.utils.clip_grad_norm_``."""


def clip_by_layer(wrapper: OptimWrapper, model: nn.Module) -> None:
    """Make an optimizer wrapper clip the gradients of folded kernels instead of the factors'.

    The norm of the factors' gradients differs from the compact network's, so that clipping by it
    gives other steps. Units that do not run folded in a step (with norms, or 'layerwise') and,
    in distributed training, units whose factors' gradients are reduced are clipped by their
    factors' gradients.

    Args:
        wrapper: changed in place, unless its class overrides clipping.
        model: the expanded model.
    """
    if not clips_as_mmengine(wrapper) or not wrapper.clip_grad_kwargs:
        return
    units = list(named_units(model).values())
    for unit in units:
        unit.kernel.gradient.enabled = True
    set_clip(wrapper, lambda wrapper: _clip(wrapper, units))


@torch.compiler.disable
def _clip(wrapper: OptimWrapper, units: list[ExpandedLayer]) -> None:
    scaled = isinstance(wrapper, AmpOptimWrapper)
    scale = wrapper.loss_scaler.get_scale() if scaled else 1.0
    held = dict.fromkeys(p for group in wrapper.optimizer.param_groups for p in group['params'])
    # Each of several optimizers clips the gradients of its own units.
    mine = [unit for unit in units if any(p in held for p in unit.expression.parameters())]
    folded = {unit: _kernel_parameters(unit, scale) for unit in mine}
    folded = {unit: parameters for unit, parameters in folded.items() if parameters}
    factors = {p for unit in folded for p in unit.expression.parameters()}
    parameters = [p for p in held if p not in factors and p.requires_grad and p.grad is not None]
    for of_unit in folded.values():
        parameters += of_unit
    if not parameters:
        return
    norm = wrapper.clip_func(parameters, **wrapper.clip_grad_kwargs)
    by_norm = wrapper.clip_func is clip_grad_norm_
    for unit, of_unit in folded.items():
        if by_norm:
            factor = (wrapper.clip_grad_kwargs['max_norm'] / (norm + EPS)).clamp(max=1.0)
            factors = unit.expression.parameters()
            multiply_all([p.grad for p in factors if p.grad is not None], factor)
        else:
            _hand_over(unit, *(p.grad for p in of_unit))
    if norm is not None:
        wrapper.message_hub.update_scalar(f'train/{wrapper.grad_name}', float(norm))


def _kernel_parameters(unit: ExpandedLayer, scale: float) -> list[nn.Parameter]:
    """Return parameters whose gradients are those of a unit's kernel and bias, if it has any.

    Where DDP averages the gradients of factors, the kernel's is this rank's own. The ranks would
    clip differently, so that it is not used.
    """
    found = unit.kernel.gradient.take()
    if get_world_size() > 1 and unit.folded_parameter is None:
        return []
    return [_with_gradient(gradient / scale) for gradient in found]


def _with_gradient(gradient: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty_like(gradient))
    parameter.grad = gradient
    return parameter


def _hand_over(unit: ExpandedLayer, weight: Tensor, bias: Tensor | None = None) -> None:
    for parameter, gradient in unit.kernel.pull_back(weight, bias).items():
        parameter.grad.copy_(gradient)
