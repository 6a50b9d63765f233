"""The expanded layers: a convolution and a fully-connected layer (Sec. 3.1, 3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .algebra import Affine
from .eligibility import refusal
from .expanded_layer import ExpandedLayer
from .init import INITS
from .order import FORWARDS
from .shapes import Shape, check_choice, check_rate, conv_factors, conv_method, linear_factors


class ExpandedConv2d(ExpandedLayer):
    """A convolution as a chain of convolutions without anything nonlinear between (Sec. 3.1, 3.2).

    Attributes:
        factors: the chain, ``nn.Conv2d`` layers, the one applied first in front. A bias sits
            exactly where the original has one, the padding on the first factor, the stride on
            the kxk ('cl') or last ('ck') one, the dilation on all with taps.
        weight: the folded kernel ``(n, m / groups, kh, kw)``, differentiable.
        bias: the folded bias ``(n,)`` or None, differentiable.
    """

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        rate: float = 4,
        method: str = 'cl',
        init: str = 'default',
        forward: str = 'auto',
    ) -> 'ExpandedConv2d':
        """Expand a convolution; device, dtype, mode and ``requires_grad`` carry over.

        Args:
            conv: the layer; it is not changed.
            rate: the expansion rate r > 0.
            method: 'cl', 'ck', or 'auto' ('ck' where an odd square kernel > 3 allows it).
            init: 'default' or 'preserve'.
            forward: 'layerwise', 'folded' or 'auto'.

        Raises:
            TypeError: if it is not a plain convolution.
            ValueError: for an unknown or unfit method, rate, init or forward.
        """
        _check(conv, nn.Conv2d, rate, init, forward)
        method = conv_method(method, conv.kernel_size)
        shapes = conv_factors(
            method, rate, conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups
        )
        last_with_taps = 1 if method == 'cl' else len(shapes) - 1
        factors = []
        for index, (out, inside, *kernel) in enumerate(shapes):
            factor = nn.Conv2d(
                inside * conv.groups,
                out,
                kernel,
                stride=conv.stride if index == last_with_taps else 1,
                padding=conv.padding if index == 0 and not _pads_apart(conv) else 0,
                dilation=1 if method == 'cl' and index != 1 else conv.dilation,
                groups=conv.groups,
                bias=conv.bias is not None,
                device=conv.weight.device,
                dtype=conv.weight.dtype,
            )
            factors.append(factor)
        unit = cls(conv, method, rate, factors, conv.groups, forward)
        unit._carry_over(conv, init)
        return unit

    def __init__(self, layer: nn.Conv2d, *args):
        super().__init__(layer, *args)
        # What ConvModule and its like read from a convolution.
        for name in [
            'in_channels',
            'out_channels',
            'kernel_size',
            'stride',
            'padding',
            'padding_mode',
            'dilation',
            'transposed',
            'output_padding',
        ]:
            setattr(self, name, getattr(layer, name))
        self.memory_format = _memory_format(layer.weight)

    def _carry_over(self, conv: nn.Conv2d, init: str) -> None:
        _set_requires_grad(self, conv)
        self._lay_out_factors()
        if init == 'preserve':
            self.set_weight(conv.weight, conv.bias)

    def output_pixels(self, input_shape: Sequence[int]) -> tuple[int, ...]:
        """Output pixels of every factor, batch included, for an input ``(N, m, H, W)``."""
        *batch, _, height, width = input_shape
        left, right, top, bottom = self._layer[0]._reversed_padding_repeated_twice
        size = [height + top + bottom, width + left + right]
        pixels = []
        for factor in self.factors:
            size = [
                (size[axis] - factor.dilation[axis] * (factor.kernel_size[axis] - 1) - 1)
                // factor.stride[axis]
                + 1
                for axis in (0, 1)
            ]
            pixels.append((batch[0] if batch else 1) * size[0] * size[1])
        return tuple(pixels)

    def kernel_for_forward(self, affine: Affine) -> Affine:
        """A product in the memory format that the network runs in.

        A channels_last kernel would turn the whole network channels_last.
        """
        weight, bias = affine
        return weight.contiguous(memory_format=self.memory_format), bias

    def _apply_product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, segment: tuple[int, int]
    ) -> Tensor:
        start, stop = segment
        factors = list(self.factors)[start:stop]
        stride = tuple(max(f.stride[axis] for f in factors) for axis in (0, 1))
        dilation = tuple(max(f.dilation[axis] for f in factors) for axis in (0, 1))
        padding = factors[0].padding
        layer = self._layer[0]
        if start == 0 and _pads_apart(layer):
            mode = 'constant' if layer.padding_mode == 'zeros' else layer.padding_mode
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        return F.conv2d(x, weight, bias, stride, padding, dilation, self.groups)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # nn.Conv2d's, with a kernel that the caller made from ours (efficient_conv_bn_eval).
        return self._apply_product(x, weight, bias, (0, len(self.factors)))

    def to_conv(self) -> nn.Conv2d:
        """The exact convolution it came from, its weight the product of the factors.

        Multiplied in float64; the dtype, device, memory format, mode and ``requires_grad`` are
        the unit's.
        """
        conv = self._contract()
        conv.weight.data = conv.weight.data.contiguous(memory_format=self.memory_format)
        return conv

    @property
    def _layer_weight_shape(self) -> Shape:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _as_layer_weight(self, kernel: Tensor) -> Tensor:
        return kernel

    def _lay_out_factors(self) -> None:
        # Kernels with the channels last are the matrices that folding multiplies: no copies.
        for factor in self.factors:
            factor.weight.data = factor.weight.data.contiguous(memory_format=torch.channels_last)

    def _apply(self, fn, recurse: bool = True) -> nn.Module:  # noqa: ANN001
        """Move or cast, keeping the factors' layout; a new memory format is the folded kernel's."""
        super()._apply(fn, recurse)
        probe = torch.empty(2, 2, 2, 2, device=self.factors[0].weight.device)
        probe = probe.contiguous(memory_format=self.memory_format)
        self.memory_format = _memory_format(fn(probe))
        self._lay_out_factors()
        self._forget_products()
        return self


class ExpandedLinear(ExpandedLayer):
    """A fully-connected layer as three in a row (Sec. 3.2, Eq. 4).

    Attributes:
        factors: three ``nn.Linear`` layers, m -> rm -> rn -> n.
        weight: the folded weight ``(n, m)``, differentiable.
        bias: the folded bias ``(n,)`` or None, differentiable.
    """

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rate: float = 4,
        method: str = 'fc',
        init: str = 'default',
        forward: str = 'auto',
    ) -> 'ExpandedLinear':
        """Expand a linear layer; see ``ExpandedConv2d.from_conv`` for arguments and errors."""
        _check(linear, nn.Linear, rate, init, forward)
        if 'fc' not in method.split('+'):
            raise ValueError(f"a linear layer is expanded by 'fc', got {method!r}")
        bias, like = linear.bias is not None, linear.weight
        factors = [
            nn.Linear(inside, out, bias=bias, device=like.device, dtype=like.dtype)
            for out, inside, *_ in linear_factors(rate, linear.in_features, linear.out_features)
        ]
        unit = cls(linear, 'fc', rate, factors, 1, forward)
        _set_requires_grad(unit, linear)
        if init == 'preserve':
            unit.set_weight(linear.weight, linear.bias)
        return unit

    def __init__(self, layer: nn.Linear, *args):
        super().__init__(layer, *args)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def output_pixels(self, input_shape: Sequence[int]) -> tuple[int, ...]:
        """Rows of the output of every factor, for an input ``(..., m)``."""
        return (torch.Size(input_shape[:-1]).numel(),) * len(self.factors)

    def _apply_product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, segment: tuple[int, int]
    ) -> Tensor:
        return F.linear(x, self._as_layer_weight(weight), bias)

    def to_linear(self) -> nn.Linear:
        """The exact linear layer it came from; see ``ExpandedConv2d.to_conv``."""
        return self._contract()

    @property
    def _layer_weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _as_layer_weight(self, kernel: Tensor) -> Tensor:
        return kernel[:, :, 0, 0]


def _check(layer: nn.Module, kind: type, rate: float, init: str, forward: str) -> None:
    reason = refusal(layer, kind)
    if reason:
        raise TypeError(f'{type(layer).__name__} cannot be expanded: {reason}')
    check_rate(rate)
    check_choice('forward', forward, FORWARDS)
    check_choice('init', init, INITS)


def _set_requires_grad(unit: ExpandedLayer, layer: nn.Module) -> None:
    for factor in unit.factors:
        for name, parameter in factor.named_parameters():
            parameter.requires_grad_(getattr(layer, name).requires_grad)
        factor.train(layer.training)


def _pads_apart(conv: nn.Conv2d) -> bool:
    # Padding that no factor can do: once, before the first one.
    return conv.padding_mode != 'zeros' or isinstance(conv.padding, str)


def _memory_format(weight: Tensor) -> torch.memory_format:
    channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    if channels_last and not weight.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
