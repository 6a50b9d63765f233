"""Which layers can be expanded: those known to compute what torch's plain ones do."""

from torch import nn

from .compat import convolves_as_torch, parameters_of
from .expanded_layer import ExpandedLayer

EXPANDED_ALREADY = 'it is expanded already'

PLAIN_LAYERS: set[type] = {nn.Conv2d, nn.ConvTranspose2d, nn.Linear}
"""Classes known to compute what these layers of torch do, besides the subclasses that
have no forward of their own. A framework's thin wrappers are added by the layer that knows it."""


def refusal(layer: nn.Module, kind: type) -> str:
    """Why ``layer`` cannot become a unit; empty where it can.

    Args:
        layer: any module.
        kind: ``nn.Conv2d``, ``nn.ConvTranspose2d`` or ``nn.Linear``.
    """
    name = type(layer).__name__
    if isinstance(layer, ExpandedLayer):
        return EXPANDED_ALREADY
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return f'{name} has no weight before its first forward; run one, then expand'
    if 'quantized' in type(layer).__module__ or hasattr(layer, 'weight_fake_quant'):
        return f'{name} is quantised; expand and train in floating point, quantise afterwards'
    if not isinstance(layer, kind):
        return f'{name} is no {kind.__name__}'
    plain = type(layer).forward is kind.forward and (
        kind is not nn.Conv2d or convolves_as_torch(layer)
    )
    if not plain and type(layer) not in PLAIN_LAYERS:
        return f'{name} has a forward of its own'
    if 'weight' not in parameters_of(layer) or set(parameters_of(layer)) - {'weight', 'bias'}:
        return f'{name} has a reparametrised weight (weight_norm, spectral_norm, parametrize)'
    if not layer.weight.is_floating_point():
        return f'its weight is {layer.weight.dtype}'
    return ''
