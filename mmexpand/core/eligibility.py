"""Eligibility of layers: only layers known to compute the same as torch's are expanded."""

from torch import nn

from .compat import convolves_as_torch, parameters_of
from .expanded_layer import ExpandedLayer

EXPANDED_ALREADY = 'it is expanded already'

PLAIN_LAYERS: set[type] = {nn.Conv2d, nn.ConvTranspose2d, nn.Linear}
"""Classes known to compute the same as torch's layer, in addition to subclasses that inherit
``forward``. ``mm`` adds OpenMMLab's thin wrappers."""


def refusal(layer: nn.Module, kind: type) -> str:
    """Return the reason why ``layer`` cannot become a unit, or ''.

    Args:
        layer: any module.
        kind: ``nn.Conv2d``, ``nn.ConvTranspose2d`` or ``nn.Linear``.
    """
    if not {'forward', '_conv_forward'}.isdisjoint(vars(layer)):
        return f'{type(layer).__name__} has a forward of its own'
    return class_refusal(layer, kind)


def class_refusal(layer: nn.Module, kind: type) -> str:
    """Return the reason why a class of layers cannot become units, or ''.

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
        return f'{name} is not a {kind.__name__}'
    plain = type(layer).forward is kind.forward and (
        kind is not nn.Conv2d or convolves_as_torch(layer)
    )
    if not plain and type(layer) not in PLAIN_LAYERS:
        return f'{name} has a forward of its own'
    if 'weight' not in parameters_of(layer) or set(parameters_of(layer)) - {'weight', 'bias'}:
        return f'{name} has a reparametrised weight (weight_norm, spectral_norm, parametrize)'
    if not layer.weight.is_floating_point():
        return f'its weight is {layer.weight.dtype}, not floating point'
    return ''
