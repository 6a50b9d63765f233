"""The spec of a layer, as blocks see it: what it computes, and factors that fit into it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Real

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UserTypeError, UserValueError
from .algebra import transpose
from .compat import padding_by_side
from .options import BlockOptions

Pair = tuple[int, int]

SPEC_KEY = 'expanded_site'
"""The buffer of an expression, unless it is a chain by itself, that says what it is built from."""


def check_rate(rate: float) -> None:
    """Refuse an expansion rate that is not a finite number above 0.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is not above 0.
    """
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise UserTypeError(f'rate must be a number above 0, got {rate!r}')
    if not (rate > 0 and math.isfinite(rate)):
        raise UserValueError(f'rate must be a number above 0, got {rate!r}')


def widen(channels: int, rate: float) -> int:
    """Channels times rate, rounded (half up), at least 1."""
    return max(1, math.floor(channels * rate + 0.5))


@dataclass(frozen=True)
class LayerSpec:
    """The layer that a block is built for: a convolution or a linear layer.

    Attributes:
        in_channels: m, of all groups together.
        out_channels: n, of all groups together.
        kernel_size: height and width; (1, 1) of a linear layer.
        rate: the expansion rate r.
        groups: every group is expanded by itself.
        bias: whether the layer has one.
        stride: of the layer.
        padding: with zeros, on both sides of an axis; what else a layer pads, the unit does
            before.
        dilation: of the layer.
        upsampling: of a transposed convolution its stride; None: of another layer. Its factors
            see the image with zeros put in between the pixels, which the unit does before, and
            have no stride.
        linear: whether factors are linear layers.
        like: a tensor of the factors' device and dtype.
        options: of the block.
    """

    in_channels: int
    out_channels: int
    kernel_size: Pair
    rate: float
    groups: int = 1
    bias: bool = False
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    upsampling: Pair | None = None
    linear: bool = False
    like: torch.Tensor = torch.empty(0)  # noqa: RUF009  (never changed)
    options: BlockOptions = BlockOptions()  # noqa: RUF009  (never changed)

    @classmethod
    def of(
        cls,
        layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear,
        rate: float,
        options: BlockOptions | None = None,
        device: str | None = None,
    ) -> 'LayerSpec':
        """Return the spec of a layer.

        Args:
            layer: a convolution, a transposed one or a linear layer.
            rate: the expansion rate r.
            options: of the block; None: the default ones.
            device: of the factors; None: the layer's.
        """
        options = options or BlockOptions()
        like = torch.empty(0, dtype=layer.weight.dtype, device=device or layer.weight.device)
        bias = layer.bias is not None
        if isinstance(layer, nn.Linear):
            sizes = layer.in_features, layer.out_features
            return cls(*sizes, (1, 1), rate, bias=bias, linear=True, like=like, options=options)
        return cls(
            layer.in_channels,
            layer.out_channels,
            tuple(layer.kernel_size),
            rate,
            layer.groups,
            bias,
            (1, 1) if layer.transposed else layer.stride,
            (0, 0) if pads_apart(layer) else layer.padding,
            layer.dilation,
            layer.stride if layer.transposed else None,
            like=like,
            options=options,
        )

    def record(self) -> torch.Tensor:
        """What a kernel's expression is built from again, as integers for a state dict."""
        rate = Fraction(self.rate)
        sizes = self.in_channels, self.out_channels, *self.kernel_size, self.groups, int(self.bias)
        upsampling = self.upsampling or ()
        floored = 1  # See ``core/blocks/upgrade.py``.
        last = 2 * self.options.encode() + floored
        return torch.tensor((*sizes, rate.numerator, rate.denominator, *upsampling, last))

    @classmethod
    def from_record(cls, record: torch.Tensor, like: torch.Tensor) -> 'LayerSpec':
        """Return the spec that ``record`` was made of, but for stride, padding and dilation."""
        m, n, height, width, groups, bias, numerator, denominator, *rest = record.tolist()
        *upsampling, last = rest
        return cls(
            m,
            n,
            (height, width),
            numerator / denominator,
            groups,
            bool(bias),
            upsampling=tuple(upsampling) or None,
            like=like.new_empty(0),
            options=BlockOptions.decode(last // 2),
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the layer's weight."""
        if self.linear:
            return self.out_channels, self.in_channels
        first, second = self.out_channels, self.in_channels
        if self.upsampling:
            first, second = second, first
        return first, second // self.groups, *self.kernel_size

    def as_weight(self, kernel: torch.Tensor) -> torch.Tensor:
        """Return the layer's 4-dimensional kernel in the shape of its weight."""
        return kernel[:, :, 0, 0] if self.linear else kernel

    def turn(self, kernel: torch.Tensor) -> torch.Tensor:
        """Return the layer's kernel for the block's, or the block's for the layer's."""
        return transpose(kernel, self.groups) if self.upsampling else kernel

    def widen_inputs(self) -> int:
        """Of the first factor, p = rm, in every group."""
        return self.groups * widen(self.in_channels // self.groups, self.rate)

    def widen_outputs(self) -> int:
        """Of the last but one, q = rn, in every group."""
        return self.groups * widen(self.out_channels // self.groups, self.rate)

    def factor(
        self,
        inputs: int,
        outputs: int,
        kernel_size: Pair = (1, 1),
        pads: bool = False,
        strides: bool = False,
        bias: bool | None = None,
        groups: int | None = None,
    ) -> nn.Module:
        """A factor, initialised as torch does it.

        Args:
            inputs: its channels, of all groups together.
            outputs: its channels, of all groups together.
            kernel_size: of a linear layer (1, 1).
            pads: whether it pads for the whole block: its first factor does.
            strides: whether it has the block's stride: its last factor with taps does.
            bias: None: where the layer has one.
            groups: None: the layer's.
        """
        bias = self.bias if bias is None else bias
        how = dict(bias=bias, device=self.like.device, dtype=self.like.dtype)
        if self.linear:
            return nn.Linear(inputs, outputs, **how)
        stride = self.stride if strides else (1, 1)
        skips = tuple(kernel_size) == (1, 1) and max(stride) > 1
        return (SkippingConv2d if skips else nn.Conv2d)(
            inputs,
            outputs,
            kernel_size,
            stride=stride,
            padding=tuple(max(0, p) for p in self.padding) if pads else 0,
            dilation=self.dilation if tuple(kernel_size) != (1, 1) else 1,
            groups=self.groups if groups is None else groups,
            **how,
        )

    def branch(self, kernel_size: Pair) -> 'LayerSpec':
        """Return the spec of a branch with a smaller kernel, centred in this one; it has no bias.

        Its padding is less by the taps that it lacks. Below none the image is cropped (``Sum``).
        """
        padding = tuple(
            p - d * margin
            for p, d, margin in zip(
                self.padding, self.dilation, margins(self.kernel_size, kernel_size), strict=True
            )
        )
        return replace(self, kernel_size=tuple(kernel_size), padding=padding, bias=False)

    def conv(self, bias: bool = False) -> nn.Conv2d:
        """Return a factor that is the whole layer."""
        return self.factor(
            self.in_channels, self.out_channels, self.kernel_size, True, True, bias=bias
        )

    @property
    def is_depthwise(self) -> bool:
        """Return whether an output sees one input, which may be dead behind a ReLU."""
        return self.groups == self.in_channels

    def not_odd(self) -> str:
        """Why smaller kernels cannot be centred in this one; empty where they can."""
        height, width = self.kernel_size
        if height == width == 1:
            return 'its kernel is 1x1'
        if height % 2 == 0 or width % 2 == 0:
            return f'its kernel is even ({height}x{width})'
        return ''


class SkippingConv2d(nn.Conv2d):
    """A 1x1 convolution with a stride, as one without on the pixels that it sees.

    The gradient of the former's weight, of less than eight channels that are kept last, is written
    beyond its memory on a CPU (uxlfoundation/oneDNN#6035; seen with torch 2.9).
    """

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        y, x = self.stride
        seen = F.pad(input, padding_by_side(self))[..., ::y, ::x]
        return F.conv2d(seen, weight, bias, groups=self.groups)


def pads_apart(conv: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Whether a convolution pads as no factor can: once, before the first one."""
    return conv.transposed or conv.padding_mode != 'zeros' or isinstance(conv.padding, str)


def margins(whole: Sequence[int], part: Sequence[int]) -> Pair:
    """Taps between the border of a kernel and that of a smaller one centred in it, by axis."""
    return tuple((large - small) // 2 for large, small in zip(whole, part, strict=True))


def output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    axes = zip(size, kernel, stride, padding, dilation, strict=True)
    return tuple((s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in axes)
