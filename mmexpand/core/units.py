"""The expanded layers: a chain of linear factors in the place of one layer (Sec. 3)."""

import copy
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from . import init as initialisation
from .algebra import Affine, fold, has_taps
from .leaf import FoldedLeaf
from .order import Segments, cheapest_segments, check_forward
from .shapes import Shape, check_rate, conv_factors, conv_method, linear_factors

logger = logging.getLogger(__name__)

INITS = ('default', 'preserve')

EXPANDED_ALREADY = 'it is expanded already'

PLAIN_LAYERS: set[type] = {nn.Conv2d, nn.Linear}
"""Classes known to compute what ``nn.Conv2d`` or ``nn.Linear`` do, besides the subclasses that
have no forward of their own. A framework's thin wrappers are added by the layer that knows it."""


# Fused optimizers change parameters without a trace on their version counters.
_optimizer_steps = 0


def _count_optimizer_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


class _ExpandedLayer(nn.Module):
    """What both units share: factors, their product, and the layer they stand for."""

    def __init__(
        self,
        layer: nn.Module,
        method: str,
        rate: float,
        factors: Sequence[nn.Module],
        groups: int,
        forward: str,
    ):
        super().__init__()
        self.method = method
        self.rate = rate
        self.groups = groups
        self.forward_order = forward
        self.factors = nn.ModuleList(factors)
        # The layer without its parameters, in a tuple so that it is no submodule: contraction
        # gives back this class with these attributes and hooks.
        self._layer = (_without_parameters(layer),)
        self._folded: tuple | None = None
        self._last_segments: Segments | None = None
        self.leaf: FoldedLeaf | None = None
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: the same shapes in and out as the layer it stands for.

        In eval mode the product is applied whatever ``forward`` says: the compact computation.
        """
        if not self.training or self.forward_order == 'folded' or self.leaf is not None:
            return self._apply_segments(x, ((0, len(self.factors)),))
        if self.forward_order == 'layerwise':
            return self.forward_layerwise(x)
        segments = self.segments(x.shape)
        if segments != self._last_segments:
            self._last_segments = segments
            logger.debug('%s at %s: %s', self._layer[0], tuple(x.shape), segments)
        if segments[0] == (0, 1) and not has_taps(_as_kernel(self.factors[0].weight)):
            # The first 1x1 costs next to nothing beside the others, and its output is r times
            # larger than its input: kept is the input, from which backward applies it again.
            # (Checkpointing stops there: what follows is not computed twice.)
            x = checkpoint(
                self._apply_segments,
                x,
                segments[:2],
                use_reentrant=False,
                preserve_rng_state=False,
            )
            segments = segments[2:]
        return self._apply_segments(x, segments)

    def forward_layerwise(self, x: Tensor) -> Tensor:
        """Apply one factor after another, in any mode: the paper's chain."""
        return self._apply_segments(x, tuple((i, i + 1) for i in range(len(self.factors))))

    def segments(self, input_shape: Sequence[int]) -> Segments:
        """The cheapest order of association for an input of this shape."""
        raise NotImplementedError

    def _apply_segments(self, x: Tensor, segments: Segments) -> Tensor:
        for segment in segments:
            x = self._apply_product(x, *self._fold_for_forward(segment), segment)
        return x

    def _apply_product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, segment: tuple[int, int]
    ) -> Tensor:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The folded kernel, differentiable, in the shape of the layer's weight."""
        return self._as_layer_weight(self.fold()[0])

    @property
    def bias(self) -> Tensor | None:
        """The folded bias, differentiable, in the shape of the layer's; None where it has none."""
        return self.fold()[1] if self._has_bias else None

    @property
    def factor_shapes(self) -> list[Shape]:
        """Kernel shapes of the factors, the one applied first in front."""
        return [tuple(_as_kernel(factor.weight).shape) for factor in self.factors]

    @property
    def _has_bias(self) -> bool:
        return self.factors[-1].bias is not None

    def fold(self, segment: tuple[int, int] | None = None) -> Affine:
        """The product of the factors, or of a range of them, as a 4-dimensional kernel and bias.

        Computed in float32 at least, and outside autocast: a product of rounded factors drifts.
        """
        start, stop = segment or (0, len(self.factors))
        affines = [_affine(factor) for factor in self.factors][start:stop]
        if len(affines) == 1:
            return affines[0]
        like = affines[0][0]
        wide = torch.promote_types(like.dtype, torch.float32)
        with torch.autocast(like.device.type, enabled=False):
            affine = fold([_cast(affine, wide) for affine in affines], self.groups)
        return _cast(affine, like.dtype)

    def factor_state(self) -> tuple:
        """Equal as long as no factor was trained, changed in place, loaded, replaced or moved."""
        factors = tuple((p.data_ptr(), p._version, p.dtype) for p in self.factors.parameters())
        return _optimizer_steps, factors

    def kernel_for_forward(self, affine: Affine) -> Affine:
        """A product in the memory format that the network runs in."""
        return affine

    def _constant_fold(self) -> Affine:
        """The whole product, kept until a factor changes; for where no gradient is asked for."""
        state = self.factor_state()
        if self._folded is None or self._folded[0] != state:
            with torch.no_grad():
                self._folded = state, self.kernel_for_forward(self.fold())
        return self._folded[1]

    def _fold_for_forward(self, segment: tuple[int, int]) -> Affine:
        if segment == (0, len(self.factors)):
            if self.training and self.leaf is not None:
                return self.leaf.refresh()
            trained = any(parameter.requires_grad for parameter in self.factors.parameters())
            if not (trained and torch.is_grad_enabled()):
                return self._constant_fold()
        return self.kernel_for_forward(self.fold(segment))

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode, and forget the kept product.

        Swapping weights through ``Tensor.data``, as EMA hooks do around a validation, leaves no
        trace on a parameter, but is followed by a change of mode.
        """
        self._forget_products()
        return super().train(mode)

    def _forget_products(self) -> None:
        self._folded = None
        if self.leaf is not None:
            self.leaf.forget()

    def __getstate__(self) -> dict:
        """Pickle and deep-copy without kept products: a copy is not part of a reducer."""
        return {**self.__dict__, '_folded': None, 'leaf': None}

    @torch.no_grad()
    def set_weight(self, weight: Tensor, bias: Tensor | None) -> None:
        """Give the factors values whose product is this weight and bias, to rounding.

        Args:
            weight: in the shape of the layer's weight.
            bias: in the shape of the layer's bias, None where it has none.

        Raises:
            ValueError: if the rate makes it impossible ('preserve' in DESIGN: CL and FC need
                r >= 1, CK r >= 4 or more).
        """
        present = [_as_kernel(factor.weight) for factor in self.factors]
        kernel = _as_kernel(weight.to(present[0].device))
        new = initialisation.factorise(kernel, self.strategy, present, self.groups)
        for factor, value in zip(self.factors, new, strict=True):
            factor.weight.copy_(value.view_as(factor.weight))
        if self._has_bias:
            for factor in self.factors[:-1]:
                factor.bias.zero_()
            self.factors[-1].bias.copy_(bias)

    @property
    def strategy(self) -> str:
        """How the factors multiply: 'cl' or 'ck'; a linear layer's three factors are a 1x1 CL."""
        return 'cl' if self.method == 'fc' else self.method

    def _contract(self) -> nn.Module:
        with torch.no_grad():
            factors = [_cast(_affine(factor), torch.float64) for factor in self.factors]
            weight, bias = fold(factors, self.groups)
        like = self.factors[0].weight
        layer = _without_parameters(self._layer[0])
        weight = self._as_layer_weight(weight).to(like.dtype).contiguous()
        layer.weight = nn.Parameter(weight, any(f.weight.requires_grad for f in self.factors))
        if self._has_bias:
            trained = any(factor.bias.requires_grad for factor in self.factors)
            layer.bias = nn.Parameter(bias.to(like.dtype), trained)
        return layer.train(self.training)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Load factors, or factorise where the state dict holds the compact layer."""
        weight = state_dict.pop(prefix + 'weight', None)
        if weight is not None:
            bias = state_dict.pop(prefix + 'bias', None)
            self._load_compact(weight, bias, prefix.rstrip('.'))
            for name, value in self.state_dict(prefix=prefix).items():
                state_dict[name] = value
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _load_compact(self, weight: Tensor, bias: Tensor | None, name: str) -> None:
        expected = tuple(self._layer_weight_shape)
        if tuple(weight.shape) != expected or (bias is not None) != self._has_bias:
            with_bias = 'with' if self._has_bias else 'without'
            raise ValueError(
                f'{name}: the checkpoint holds a weight of shape {tuple(weight.shape)} '
                f'{"without" if bias is None else "with"} bias, the layer has {expected} '
                f'{with_bias} bias; the checkpoint is of another network'
            )
        try:
            self.set_weight(weight, bias)
        except ValueError as error:
            raise ValueError(
                f'{name}: a compact weight cannot be loaded into this expanded layer: {error}; '
                'raise the rate, or start from the initialisation instead of the checkpoint'
            ) from None

    @property
    def _layer_weight_shape(self) -> Shape:
        raise NotImplementedError

    def _as_layer_weight(self, kernel: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What the unit stands for."""
        return f'{self._layer[0]}, method={self.method!r}, rate={self.rate}'


class ExpandedConv2d(_ExpandedLayer):
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

    def segments(self, input_shape: Sequence[int]) -> Segments:
        """The cheapest order of association for an input ``(N, m, H, W)``."""
        pixels = self.output_pixels(input_shape)
        return cheapest_segments(tuple(self.factor_shapes), pixels, self.groups)

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


class ExpandedLinear(_ExpandedLayer):
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

    def segments(self, input_shape: Sequence[int]) -> Segments:
        """The cheapest order of association for an input ``(..., m)``."""
        return cheapest_segments(tuple(self.factor_shapes), self.output_pixels(input_shape), 1)

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


def refusal(layer: nn.Module, kind: type) -> str:
    """Why ``layer`` cannot become a unit; empty where it can.

    Args:
        layer: any module.
        kind: ``nn.Conv2d`` or ``nn.Linear``.
    """
    name = type(layer).__name__
    if isinstance(layer, _ExpandedLayer):
        return EXPANDED_ALREADY
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return f'{name} has no weight before its first forward; run one, then expand'
    if 'quantized' in type(layer).__module__ or hasattr(layer, 'weight_fake_quant'):
        return f'{name} is quantised; expand and train in floating point, quantise afterwards'
    if not isinstance(layer, kind):
        return f'{name} is no {kind.__name__}'
    plain = type(layer).forward is kind.forward and (
        kind is not nn.Conv2d or type(layer)._conv_forward is nn.Conv2d._conv_forward
    )
    if not plain and type(layer) not in PLAIN_LAYERS:
        return f'{name} has a forward of its own'
    if 'weight' not in layer._parameters or set(layer._parameters) - {'weight', 'bias'}:
        return f'{name} has a reparametrised weight (weight_norm, spectral_norm, parametrize)'
    if not layer.weight.is_floating_point():
        return f'its weight is {layer.weight.dtype}'
    return ''


def _check(layer: nn.Module, kind: type, rate: float, init: str, forward: str) -> None:
    reason = refusal(layer, kind)
    if reason:
        raise TypeError(f'{type(layer).__name__} cannot be expanded: {reason}')
    check_rate(rate)
    check_forward(forward)
    check_init(init)


def check_init(init: str) -> None:
    """Refuse an unknown initialisation.

    Raises:
        ValueError: naming those there are.
    """
    if init not in INITS:
        raise ValueError(f'init must be one of {", ".join(map(repr, INITS))}, got {init!r}')


def _without_parameters(layer: nn.Module) -> nn.Module:
    bare = copy.copy(layer)
    # Its own dictionaries of hooks and the like: a shallow copy shares them.
    bare.__dict__.update((k, v.copy()) for k, v in layer.__dict__.items() if isinstance(v, dict))
    bare._parameters = dict.fromkeys(layer._parameters)
    return bare


def _set_requires_grad(unit: _ExpandedLayer, layer: nn.Module) -> None:
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


def _as_kernel(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def _affine(factor: nn.Module) -> Affine:
    return _as_kernel(factor.weight), factor.bias


def _cast(affine: Affine, dtype: torch.dtype) -> Affine:
    weight, bias = affine
    return weight.to(dtype), None if bias is None else bias.to(dtype)
