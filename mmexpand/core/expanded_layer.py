"""What the expanded layers share: a chain of linear factors in the place of one layer (Sec. 3)."""

import copy
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from . import init as initialisation
from .algebra import Affine, fold, has_taps
from .leaf import FoldedLeaf
from .order import Segments, cheapest_segments
from .shapes import Shape

logger = logging.getLogger(__name__)


# Fused optimizers change parameters without a trace on their version counters.
_optimizer_steps = 0


def _count_optimizer_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


class ExpandedLayer(nn.Module):
    """What both units share: factors, their product, and the layer they stand for.

    Attributes:
        method: 'cl', 'ck' or 'fc'.
        rate: the expansion rate.
        groups: the number of groups, the same in all factors.
        forward_order: 'layerwise', 'folded' or 'auto'.
        factors: the chain, the one applied first in front.
        leaf: what the network sees of the product where compact-size gradients are on, else None.
    """

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
        pixels = self.output_pixels(input_shape)
        return cheapest_segments(tuple(self.factor_shapes), pixels, self.groups)

    def output_pixels(self, input_shape: Sequence[int]) -> tuple[int, ...]:
        """Output pixels of every factor, batch included, for an input of this shape."""
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


def _without_parameters(layer: nn.Module) -> nn.Module:
    bare = copy.copy(layer)
    # Its own dictionaries of hooks and the like: a shallow copy shares them.
    bare.__dict__.update((k, v.copy()) for k, v in layer.__dict__.items() if isinstance(v, dict))
    bare._parameters = dict.fromkeys(layer._parameters)
    return bare


def _as_kernel(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def _affine(factor: nn.Module) -> Affine:
    return _as_kernel(factor.weight), factor.bias


def _cast(affine: Affine, dtype: torch.dtype) -> Affine:
    weight, bias = affine
    return weight.to(dtype), None if bias is None else bias.to(dtype)
