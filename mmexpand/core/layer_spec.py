"""Layer specs: the shapes and options for which a block is built."""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Real

import torch
from torch import nn

from ..errors import UserTypeError, UserValueError
from .algebra import transpose
from .factor import ConvFactor, LinearFactor, SkippingFactor
from .geometry import Pair, margins
from .options import BlockOptions

SPEC_KEY = 'expanded_site'
"""The buffer of an expression that records its spec. Chains of other than transposed layers have
no such buffer, because their kernels suffice to fold them."""


def check_rate(rate: float) -> None:
    """Raise an error if an expansion rate is not a finite number above 0.

    Raises:
        TypeError: if the rate is not a number.
        ValueError: if the rate is not above 0, or not finite.
    """
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise UserTypeError(f'rate must be a finite number above 0, got {rate!r}')
    if not (rate > 0 and math.isfinite(rate)):
        raise UserValueError(f'rate must be a finite number above 0, got {rate!r}')


def widen(channels: int, rate: float) -> int:
    """Return channels times rate, rounded half up, at least 1."""
    return max(1, math.floor(channels * rate + 0.5))


@dataclass(frozen=True)
class LayerSpec:
    """The spec of a convolution or linear layer, for which a block is built.

    Attributes:
        in_channels: m, of all groups together.
        out_channels: n, of all groups together.
        kernel_size: height and width; (1, 1) for a linear layer.
        rate: the expansion rate r.
        groups: the number of groups; each group is expanded separately.
        bias: whether the layer has a bias.
        stride: the layer's stride; (1, 1) for a transposed convolution.
        padding: zeros on both sides of an axis, which the first factor adds. The unit adds any
            other padding before the block.
        dilation: the layer's dilation.
        upsampling: the stride of a transposed convolution; None for another layer. The unit puts
            zeros between the pixels of the image before the block.
        linear: whether factors are linear layers.
        like: a tensor of the factors' device and dtype.
        options: the block's options.
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
            layer: a convolution, transposed convolution or linear layer.
            rate: the expansion rate r.
            options: the block's options; None: the defaults.
            device: the factors' device; None: the layer's.
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
        """Return the spec as 9 or 11 integers for a state dict; ``from_record`` reads them."""
        rate = Fraction(float(self.rate))
        sizes = self.in_channels, self.out_channels, *self.kernel_size, self.groups, int(self.bias)
        upsampling = self.upsampling or ()
        last = 2 * self.options.encode() + 1  # The 1 keeps the numbers of earlier checkpoints.
        return torch.tensor((*sizes, rate.numerator, rate.denominator, *upsampling, last))

    @classmethod
    def from_record(cls, record: torch.Tensor, like: torch.Tensor) -> 'LayerSpec':
        """Return the spec of a record, which contains no stride, padding and dilation."""
        if len(record) not in (9, 11):
            raise UserValueError(
                f'{SPEC_KEY} holds {len(record)} numbers instead of 9 or 11: the checkpoint is of '
                'an unsupported version of mmexpand; contract it with that version'
            )
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
        """Return the shape of the layer's weight."""
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
        """Convert the block's kernel to the layer's, or back."""
        return transpose(kernel, self.groups) if self.upsampling else kernel

    def widen_inputs(self) -> int:
        """Return the outputs of a chain's first factor, p = rm, rounded in every group."""
        return self.groups * widen(self.in_channels // self.groups, self.rate)

    def widen_outputs(self) -> int:
        """Return the inputs of a chain's last factor, q = rn, rounded in every group."""
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
        """Build a factor, initialised by torch.

        Args:
            inputs: the number of input channels, of all groups together.
            outputs: the number of output channels, of all groups together.
            kernel_size: height and width; (1, 1) for a linear layer.
            pads: whether the factor has the layer's padding, as a block's first factor does.
            strides: whether the factor has the layer's stride, as the last factor with taps does.
            bias: whether the factor has a bias; None: if the layer has a bias.
            groups: the number of groups; None: the layer's.
        """
        bias = self.bias if bias is None else bias
        how = dict(bias=bias, device=self.like.device, dtype=self.like.dtype)
        if self.linear:
            return LinearFactor(inputs, outputs, **how)
        stride = self.stride if strides else (1, 1)
        skips = tuple(kernel_size) == (1, 1) and max(stride) > 1
        return (SkippingFactor if skips else ConvFactor)(
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
        """Return the spec, without bias, of a branch with a smaller kernel centred in this kernel.

        Its padding is reduced by the missing taps. If it is negative, ``Sum`` crops the image.
        """
        padding = tuple(
            p - d * margin
            for p, d, margin in zip(
                self.padding, self.dilation, margins(self.kernel_size, kernel_size), strict=True
            )
        )
        return replace(self, kernel_size=tuple(kernel_size), padding=padding, bias=False)

    def conv(self, bias: bool = False) -> nn.Module:
        """Build a factor with the layer's kernel size, stride, padding and dilation."""
        return self.factor(
            self.in_channels, self.out_channels, self.kernel_size, True, True, bias=bias
        )

    @property
    def is_depthwise(self) -> bool:
        """Return whether each output has a single input, which may be dead behind a ReLU."""
        return self.groups == self.in_channels

    def not_odd(self) -> str:
        """Return the reason why smaller kernels cannot be centred in this kernel, or ''."""
        height, width = self.kernel_size
        if height == width == 1:
            return 'its kernel is 1x1'
        if height % 2 == 0 or width % 2 == 0:
            return f'its kernel is even ({height}x{width})'
        return ''


def pads_apart(conv: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Return whether the unit has to pad before the block, because no factor can."""
    return conv.transposed or conv.padding_mode != 'zeros' or isinstance(conv.padding, str)
