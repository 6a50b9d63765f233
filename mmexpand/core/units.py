"""Units for convolutions, transposed convolutions and linear layers (Sec. 3.1, 3.2)."""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserTypeError
from .batch_sample import NESTED_SAMPLES, SAMPLES, BatchSample, steps
from .blocks import choose_block
from .compat import output_padding, padding_by_side
from .eligibility import refusal
from .expanded_layer import ExpandedLayer
from .expression import Chain, Norm, factors_of
from .factorise import INITS
from .geometry import output_size
from .layer_spec import LayerSpec, check_rate, pads_apart
from .names import check_choice
from .options import BlockOptions
from .strategies import FORWARDS

FEW = 64
"""Least number of output pixels for a batch sample; with fewer pixels the block runs layerwise.
Then gradients of the statistics reach the batch, which keeps gradients of so few pixels bounded."""

MEASURED_MAC = 0.5
"""Time of a multiply-accumulate operation of statistics, relative to a convolution's."""

NORM_MACS = 10
"""Time to normalise one value, in multiply-accumulate operations. Both constants fit the times of
`bn`, `repvgg` and `dbb` on layers of 16 to 256 channels and 10 to 40 rows (docs/cost.md)."""

Conv = nn.Conv2d | nn.ConvTranspose2d

ConvUnit = TypeVar('ConvUnit', bound='ExpandedConv')


class ExpandedConv(ExpandedLayer):
    """The base class of units for convolutions and transposed convolutions."""

    KIND: type
    """The class of the replaced layer; also classes that compute the same are replaced."""

    @classmethod
    def from_conv(
        cls: type[ConvUnit],
        conv: Conv,
        rate: float = 4,
        method: str = 'cl',
        init: str = 'default',
        forward: str = 'auto',
        **options: object,
    ) -> ConvUnit:
        """Return a unit for a convolution; device, dtype, mode and ``requires_grad`` carry over.

        Args:
            conv: the layer, of class ``KIND``; it is not changed.
            rate: the expansion rate r > 0.
            method: as in ``ExpandConfig``; 'auto': 'ck' for odd square kernels > 3, otherwise 'cl'.
            init: 'default' or 'preserve'.
            forward: 'layerwise', 'folded' or 'auto'.
            **options: ``shortcut``, ``norm``, ``main`` and ``nonlinear``, as in ``ExpandConfig``.

        Raises:
            TypeError: if the layer is not a plain layer of this class.
            ValueError: for an unknown or unfit method, rate, init or forward.
        """
        _check(conv, cls.KIND, rate, init, forward)
        spec = LayerSpec.of(conv, rate, BlockOptions(**options))
        unit = cls(conv, *choose_block(method, spec), forward)
        _carry_over(unit, conv, init)
        return unit

    def __init__(self, layer: Conv, *args):
        super().__init__(layer, *args)
        # ConvModule and similar classes read these attributes.
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
        nested = any(isinstance(inner, Norm) for n in self._norms for inner in n.node.modules())
        self._least_samples = NESTED_SAMPLES if nested else SAMPLES

    def _pad(self, x: Tensor, *call: object) -> Tensor:
        """Return the image to which the expression is applied."""
        raise NotImplementedError

    def _as_memory_format(self, kernel: Tensor) -> Tensor:
        # A channels_last kernel would turn the whole network channels_last.
        return kernel.contiguous(memory_format=self.memory_format)

    def _apply_branches(self, x: Tensor, *call: object) -> Tensor:
        # Factors may be in channels_last for folding, which must not spread to the output.
        return self.expression(self._pad(x, *call)).contiguous(memory_format=self.memory_format)

    def _sample(self, x: Tensor, *call: object) -> BatchSample | None:
        if x.dim() != 4 or self._synchronises:
            return None
        pixels = self._layer_pixels(x.shape)
        if pixels < FEW or (self.forward_order == 'auto' and not self._measures_cheaply(x)):
            return None
        return BatchSample(self._pad(x, *call), self.spec, self._least_samples)

    @property
    def _synchronises(self) -> bool:
        """Return whether norms pool their statistics over processes, as only layerwise norms do."""
        return any(_is_synchronised(norm.norm) for norm in self._norms)

    def _measures_cheaply(self, x: Tensor) -> bool:
        """Return whether running folded with a batch sample costs less than running layerwise.

        On a GPU the result is False: there the number of operations counts, and branches have
        fewer. Statistics apply every norm's kernel, in the layer's size, to the sampled pixels.
        """
        pixels, out = self._layer_pixels(x.shape), self.spec.out_channels
        sampled = pixels // math.prod(steps(pixels, self.spec, self._least_samples))
        # From all pixels, the statistics of an ungrouped layer cost as much as its branches.
        if x.device.type != 'cpu' or (sampled == pixels and self.groups == 1):
            return False
        norms = len(self._norms)
        applied = self.count_macs(x.shape, folded=True, with_folding=False)
        branches = self.count_macs(x.shape, folded=False) - applied
        measuring = MEASURED_MAC * norms * applied // pixels * sampled
        return measuring <= branches + NORM_MACS * norms * pixels * out

    def _reformat_factors(self) -> None:
        # Folding multiplies kernels in channels_last as matrices, without copies.
        if not self.is_linear:
            return
        for module in self.expression.modules():
            if isinstance(module, Chain):
                for factor in factors_of(module):
                    weight = factor.weight.data
                    factor.weight.data = weight.contiguous(memory_format=torch.channels_last)

    def _apply(self, fn, recurse: bool = True) -> nn.Module:  # noqa: ANN001
        """Move or cast; factors keep their layout, the folded kernel takes a new memory format."""
        super()._apply(fn, recurse)
        image = torch.empty(2, 2, 2, 2, device=self.like.device)
        image = image.contiguous(memory_format=self.memory_format)
        self.memory_format = _memory_format(fn(image))
        self._reformat_factors()
        self.forget_products()
        return self


class ExpandedConv2d(ExpandedConv):
    """A unit for a convolution: a chain of convolutions (Sec. 3.1, 3.2) or another block.

    Attributes:
        factors: for 'cl' and 'ck' the ``nn.Conv2d`` factors in the order of application. They have
            biases if and only if the convolution has a bias.
        weight: the folded kernel ``(n, m / groups, kh, kw)``, differentiable.
        bias: the folded bias ``(n,)`` or None, differentiable.
    """

    KIND = nn.Conv2d

    def to_conv(self) -> nn.Conv2d:
        """Return the replaced convolution with the folded kernel.

        The fold is computed in float64. Dtype, device, memory format, mode and ``requires_grad``
        are the unit's.
        """
        return self._contract()

    def _padded_size(self, input_shape: Sequence[int]) -> tuple[int, tuple[int, int]]:
        *batch, _, height, width = input_shape
        layer = self._layer[0]
        if pads_apart(layer):
            left, right, top, bottom = padding_by_side(layer)
            height, width = height + top + bottom, width + left + right
        return batch[0] if batch else 1, (height, width)

    def _layer_pixels(self, input_shape: Sequence[int]) -> int:
        batch, size = self._padded_size(input_shape)
        layer = self._layer[0]
        padding = (0, 0) if pads_apart(layer) else layer.padding
        height, width = output_size(size, layer.kernel_size, layer.stride, padding, layer.dilation)
        return batch * height * width

    def _pad(self, x: Tensor) -> Tensor:
        layer = self._layer[0]
        if not pads_apart(layer):
            return x
        mode = 'constant' if layer.padding_mode == 'zeros' else layer.padding_mode
        return F.pad(x, padding_by_side(layer), mode=mode)

    def _apply_kernel(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = self._layer[0]
        padding = 0 if pads_apart(layer) else layer.padding
        x = self._pad(x)
        return F.conv2d(x, weight, bias, layer.stride, padding, layer.dilation, self.groups)

    # mmengine's efficient_conv_bn_eval calls this method with a kernel computed from the unit's.
    _conv_forward = _apply_kernel


class ExpandedConvTranspose2d(ExpandedConv):
    """A unit for a transposed convolution.

    A transposed convolution equals a convolution, with its kernel flipped, of the image with
    zeros between and around the pixels. The block replaces this convolution, so that all blocks
    fit. Layerwise the block is applied to this image. Folded it is one transposed convolution.

    Attributes:
        weight: the folded kernel ``(m, n / groups, kh, kw)``, differentiable.
        bias: the folded bias ``(n,)`` or None, differentiable.
    """

    KIND = nn.ConvTranspose2d

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Apply the unit as ``ExpandedLayer.forward``; ``output_size`` as in torch."""
        return self._run(input, output_padding(self._layer[0], input, output_size))

    def forward_layerwise(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Apply one factor after another, in any mode; ``output_size`` as in torch."""
        return super().forward_layerwise(input, output_padding(self._layer[0], input, output_size))

    def to_conv(self) -> nn.ConvTranspose2d:
        """Return the replaced transposed convolution; see ``ExpandedConv2d.to_conv``."""
        return self._contract()

    def _borders(self, output_padding: Sequence[int]) -> tuple[int, int, int, int]:
        """Return the zeros left, right, above and below the image; negative values crop it."""
        layer = self._layer[0]
        before = [
            d * (k - 1) - p
            for d, k, p in zip(layer.dilation, layer.kernel_size, layer.padding, strict=True)
        ]
        (top, left), (rows, columns) = before, output_padding
        return left, left + columns, top, top + rows

    def _padded_size(self, input_shape: Sequence[int]) -> tuple[int, tuple[int, int]]:
        *batch, _, height, width = input_shape
        layer = self._layer[0]
        (down, right), borders = layer.stride, self._borders(layer.output_padding)
        before, after, above, below = borders
        size = (height - 1) * down + 1 + above + below, (width - 1) * right + 1 + before + after
        return batch[0] if batch else 1, size

    def _layer_pixels(self, input_shape: Sequence[int]) -> int:
        return torch.Size(input_shape).numel() // self.in_channels

    def _pad(self, x: Tensor, output_padding: Sequence[int]) -> Tensor:
        down, right = self._layer[0].stride
        height, width = x.shape[-2:]
        spread = x.new_zeros(*x.shape[:-2], (height - 1) * down + 1, (width - 1) * right + 1)
        spread[..., ::down, ::right] = x
        return F.pad(spread, self._borders(output_padding))

    def _apply_kernel(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, output_padding: Sequence[int]
    ) -> Tensor:
        layer = self._layer[0]
        how = layer.stride, layer.padding, output_padding, self.groups, layer.dilation
        return F.conv_transpose2d(x, weight, bias, *how)


class ExpandedLinear(ExpandedLayer):
    """A unit for a linear layer: three linear layers in a row (Sec. 3.2, Eq. 4).

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
        **options: object,
    ) -> 'ExpandedLinear':
        """Return a unit for a linear layer; see ``ExpandedConv2d.from_conv`` for arguments."""
        _check(linear, nn.Linear, rate, init, forward)
        spec = LayerSpec.of(linear, rate, BlockOptions(**options))
        unit = cls(linear, *choose_block(method, spec), forward)
        _carry_over(unit, linear, init)
        return unit

    def __init__(self, layer: nn.Linear, *args):
        super().__init__(layer, *args)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def _padded_size(self, input_shape: Sequence[int]) -> tuple[int, tuple[int, int]]:
        return torch.Size(input_shape[:-1]).numel(), (1, 1)

    def _layer_pixels(self, input_shape: Sequence[int]) -> int:
        return torch.Size(input_shape[:-1]).numel()

    def _apply_kernel(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.spec.as_weight(weight), bias)

    def _apply_branches(self, x: Tensor) -> Tensor:
        return self.expression(x)

    def to_linear(self) -> nn.Linear:
        """Return the replaced linear layer; see ``ExpandedConv2d.to_conv``."""
        return self._contract()


def _check(layer: nn.Module, kind: type, rate: float, init: str, forward: str) -> None:
    reason = refusal(layer, kind)
    if reason:
        raise UserTypeError(f'{type(layer).__name__} cannot be expanded: {reason}')
    check_rate(rate)
    check_choice('forward', forward, FORWARDS)
    check_choice('init', init, INITS)


def _is_synchronised(norm: nn.Module) -> bool:
    # mmcv's class does not derive from torch's.
    return any(kind.__name__ == 'SyncBatchNorm' for kind in type(norm).__mro__)


def _carry_over(unit: ExpandedLayer, layer: nn.Module, init: str) -> None:
    for name, parameter in unit.named_parameters():
        like = layer.bias if name.endswith('bias') else layer.weight
        parameter.requires_grad_(like is not None and like.requires_grad)
    unit.train(layer.training)
    if isinstance(unit, ExpandedConv):
        unit._reformat_factors()
    if init == 'preserve':
        unit.set_weight(layer.weight, layer.bias)


def _memory_format(weight: Tensor) -> torch.memory_format:
    channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    if channels_last and not weight.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
