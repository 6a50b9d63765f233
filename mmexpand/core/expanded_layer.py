"""What the expanded layers share: linear factors in the place of one layer (Sec. 3)."""

import copy
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from .algebra import Affine, fold, has_taps
from .blocks import BLOCKS
from .blocks.nonlinear import NonlinearChain
from .expression import (
    Chain,
    Norm,
    Shape,
    add_bias,
    apply_macs,
    as_kernel,
    fold_macs,
    fold_node,
    kernel_refusal,
    leaves,
)
from .leaf import FoldedLeaf
from .order import Segments, cheapest_segments, count_macs
from .probe import Probe
from .site import Site

FACTORS = 'factors'
"""Where a chain is in a unit; the expression of another block is under the block's name."""

SITE_KEY = 'expanded_site'
"""The buffer of any other block's expression that says what it is built from."""

logger = logging.getLogger(__name__)


# Fused optimizers change parameters without a trace on their version counters.
_optimizer_steps = 0


def _count_optimizer_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


class Offer:
    """A weight and bias that a unit lets be written to, and whether they were.

    Attributes:
        weight: in the shape of the layer's.
        bias: in the shape of the layer's, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        self._before = weight.clone(), None if bias is None else bias.clone()

    @property
    def weight_was_written(self) -> bool:
        """Whether the weight is another one."""
        return not torch.equal(self.weight, self._before[0])

    @property
    def bias_was_written(self) -> bool:
        """Whether there is a bias, and it is another one."""
        return self.bias is not None and not torch.equal(self.bias, self._before[1])


class ExpandedLayer(nn.Module):
    """What both units share: an expression in the place of a layer, and the layer it stands for.

    Attributes:
        method: the block: a key of ``BLOCKS``.
        has_kernel: whether there is a kernel; not so with ReLU between the factors.
        rate: the expansion rate.
        groups: the number of groups.
        forward_order: 'layerwise', 'folded' or 'auto'.
        factors: of 'cl', 'ck' and 'fc': the chain, the one applied first in front. The expression
            of any other block, or of a transposed convolution, is an attribute of the block's name.
        leaf: what the network sees of the kernel where compact-size gradients are on, else None.
    """

    def __init__(self, layer: nn.Module, block: str, site: Site, forward: str):
        super().__init__()
        self.method = block
        self.rate = site.rate
        self.groups = site.groups
        self.forward_order = forward
        expression = BLOCKS[block].build(site)
        self.has_kernel = not isinstance(expression, NonlinearChain)
        # A state dict is to say that a layer is transposed, and its chain is never run in parts.
        chain = isinstance(expression, Chain) and site.upsampling is None
        self._is_chain = chain and self.has_kernel
        self._root = FACTORS if chain else block
        self.add_module(self._root, expression)
        if self._root != FACTORS:
            # A state dict alone is to say what it is the expression of.
            expression.register_buffer(SITE_KEY, site.record().to(site.like.device))
        self.site = site
        norms = any(isinstance(module, Norm) for module in self.modules())
        self.is_linear = self.has_kernel and not norms
        self._has_bias = site.bias
        # The layer without its parameters, in a tuple so that it is no submodule: contraction
        # gives back this class with these attributes and hooks.
        self._layer = (_without_parameters(layer),)
        self._folded: tuple | None = None
        self._last_segments: Segments | None = None
        self.leaf: FoldedLeaf | None = None
        self._offered: Offer | None = None
        self.train(layer.training)

    @property
    def expression(self) -> nn.Module:
        """What the kernel is computed from."""
        return self._modules[self._root]

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: the same shapes in and out as the layer it stands for.

        In eval mode the folded kernel is applied whatever ``forward`` says: the compact
        computation. In training mode a block with norms in its branches is run layer by layer;
        'folded', its norms take their statistics from a part of the pixels.
        """
        x = input  # torch's name: some call layers by keyword
        if self._offered is not None:
            self.take_offered()
        if not self.has_kernel:
            return self.forward_layerwise(x)
        if self.training and not self.is_linear and self.forward_order == 'folded':
            return self._apply_measured(x)
        if self.training and (self.forward_order == 'layerwise' or not self.is_linear):
            return self._apply_layerwise(x)
        folded = self.forward_order == 'folded' or self.leaf is not None
        if not self.training or folded:
            return self._apply_folded(x)
        segments = self.segments(x.shape)
        if segments != self._last_segments:
            self._last_segments = segments
            logger.debug('%s at %s: %s', self._layer[0], tuple(x.shape), segments)
        if len(segments) == 1:
            return self._apply_folded(x)
        if not self._is_chain:
            return self._apply_layerwise(x)
        if segments[0] == (0, 1) and not has_taps(as_kernel(self.factors[0].weight)):
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

    def forward_layerwise(self, input: Tensor) -> Tensor:
        """Apply one factor after another, in any mode: the paper's chain."""
        if self._offered is not None:
            self.take_offered()
        return self._apply_layerwise(input)

    def _apply_layerwise(self, x: Tensor) -> Tensor:
        if self._is_chain:
            return self._apply_segments(x, self._layerwise)
        return self._apply_branches(x)

    def segments(self, input_shape: Sequence[int]) -> Segments:
        """The cheapest order of association for an input of this shape."""
        if self._is_chain:
            pixels = self.output_pixels(input_shape)
            return cheapest_segments(tuple(self.factor_shapes), pixels, self.groups)
        if not self.has_kernel:
            return self._layerwise
        orders = self._folded_order, self._layerwise
        return min(orders, key=lambda order: self.count_macs(input_shape, order))

    @property
    def _folded_order(self) -> Segments:
        return ((0, len(self.factor_shapes)),)

    @property
    def _layerwise(self) -> Segments:
        return tuple((index, index + 1) for index in range(len(self.factor_shapes)))

    def count_macs(
        self, input_shape: Sequence[int], segments: Segments, with_folding: bool = True
    ) -> int:
        """Multiply-accumulate operations of a forward pass in a given order of association.

        Args:
            input_shape: of the layer's input.
            segments: the order: of a block that is no chain, all factors at once or each by
                itself.
            with_folding: whether to count the products of factors, not only their application.
        """
        if self._is_chain:
            pixels = self.output_pixels(input_shape)
            return count_macs(self.factor_shapes, pixels, self.groups, segments, with_folding)
        if len(segments) > 1:
            batch, size = self._padded_size(input_shape)
            return batch * apply_macs(self.expression, size)[0]
        out, inside, height, width = self.expression.shape
        applied = self._layer_pixels(input_shape) * out * inside * height * width
        return applied + with_folding * fold_macs(self.expression)

    def output_pixels(self, input_shape: Sequence[int]) -> tuple[int, ...]:
        """Output pixels of every factor of a chain, batch included."""
        raise NotImplementedError

    def _padded_size(self, input_shape: Sequence[int]) -> tuple[int, tuple[int, int]]:
        """The batch, and the image as the expression gets it."""
        raise NotImplementedError

    def _layer_pixels(self, input_shape: Sequence[int]) -> int:
        """Pixels at which the layer applies its whole kernel, batch included."""
        raise NotImplementedError

    def _apply_folded(self, x: Tensor) -> Tensor:
        return self._apply_kernel(x, *self._fold_for_forward())

    def _apply_kernel(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer with this kernel."""
        raise NotImplementedError

    def _apply_branches(self, x: Tensor) -> Tensor:
        """Apply an expression that is no chain, layer by layer."""
        raise NotImplementedError

    def _apply_measured(self, x: Tensor) -> Tensor:
        """Apply the kernel that an expression with norms folds to by this batch's statistics."""
        raise NotImplementedError

    def _apply_segments(self, x: Tensor, segments: Segments) -> Tensor:
        for segment in segments:
            affine = self.kernel_for_forward(self.fold(segment))
            x = self._apply_product(x, *affine, segment)
        return x

    def _apply_product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, segment: tuple[int, int]
    ) -> Tensor:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The folded kernel, differentiable, in the shape of the layer's weight.

        Between ``offer_weight`` and the first use it is a tensor to be written to.
        """
        if self._offered is not None:
            return self._offered.weight
        self._check_kernel()
        return self._as_layer_weight(self._read()[0])

    @property
    def bias(self) -> Tensor | None:
        """The folded bias, differentiable, in the shape of the layer's; None where it has none."""
        if self._offered is not None:
            return self._offered.bias
        self._check_kernel()
        return self._read()[1] if self._has_bias else None

    def _check_kernel(self) -> None:
        # To those who ask first, as initialisations do, it is a module without a weight.
        if not self.has_kernel:
            raise AttributeError(kernel_refusal(self.expression))

    def _read(self) -> Affine:
        """What a module that reads the weight, in place of calling the layer, computes with."""
        if self.leaf is not None and self.training and torch.is_grad_enabled():
            return self.leaf.refresh()
        return self.fold()

    @property
    def factor_shapes(self) -> list[Shape]:
        """Kernel shapes of the factors; of a chain the one applied first in front."""
        return [tuple(as_kernel(factor.weight).shape) for factor in leaves(self.expression)]

    @property
    def like(self) -> Tensor:
        """A parameter: of the device and dtype of all."""
        return next(self.expression.parameters())

    def fold(self, segment: tuple[int, int] | None = None, probe: Probe | None = None) -> Affine:
        """The whole kernel and bias, 4-dimensional; or the product of a range of a chain's factors.

        Computed in float32 at least, and outside autocast: a product of rounded factors drifts.
        """
        like = self.like
        nodes = self.expression
        if segment is not None:
            nodes = list(nodes)[slice(*segment)]
            if len(nodes) == 1:
                return as_kernel(nodes[0].weight), nodes[0].bias
        wide = torch.promote_types(like.dtype, torch.float32)
        with torch.autocast(like.device.type, enabled=False):
            if segment is None:
                affine = nodes.fold(wide, probe)
            else:
                affine = fold([fold_node(node, wide) for node in nodes], self.groups)
        weight, bias = _cast(affine, like.dtype)
        return self._turn(weight), bias

    def _turn(self, kernel: Tensor) -> Tensor:
        """The layer's kernel for what the expression folds to, and back."""
        return kernel

    def factor_state(self) -> tuple:
        """Equal as long as no factor was trained, changed in place, loaded, replaced or moved."""
        tensors = list(self.expression.parameters())
        if not self.is_linear:
            tensors += self.expression.buffers()
        return _optimizer_steps, tuple((t.data_ptr(), t._version, t.dtype) for t in tensors)

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

    def _fold_for_forward(self) -> Affine:
        if self.training and self.leaf is not None:
            return self.leaf.refresh()
        trained = any(parameter.requires_grad for parameter in self.expression.parameters())
        if not (trained and torch.is_grad_enabled()):
            return self._constant_fold()
        return self.kernel_for_forward(self.fold())

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode, and forget the kept product.

        Swapping weights through ``Tensor.data``, as EMA hooks do around a validation, leaves no
        trace on a parameter, but is followed by a change of mode.
        """
        self.forget_products()
        return super().train(mode)

    def forget_products(self) -> None:
        """Fold anew at the next use: for changes of factors that leave no trace on them."""
        self._folded = None
        if self.leaf is not None:
            self.leaf.forget()

    def __getstate__(self) -> dict:
        """Pickle and deep-copy without kept products: a copy is not part of a reducer."""
        return {**self.__dict__, '_folded': None, 'leaf': None}

    @torch.no_grad()
    def offer_weight(self) -> None:
        """Let ``weight`` and ``bias`` be written to, as a network's own ``init_weights`` does.

        What was written by the first use of the layer is taken over by ``take_offered``. Where
        there is no kernel, there is nothing to write to.
        """
        if not self.has_kernel:
            return
        self._offered = Offer(*(None if t is None else t.clone() for t in (self.weight, self.bias)))

    @torch.no_grad()
    def take_offered(self) -> None:
        """Give the factors what was written to ``weight`` and ``bias``; nothing, if nothing was.

        Raises:
            ValueError: if the rate makes it impossible.
        """
        offered, self._offered = self._offered, None
        if offered is None:
            return
        # Nothing that moves the factors to a GPU moves what is offered.
        if offered.weight_was_written and self.is_linear:
            self.set_weight(offered.weight, offered.bias)
        elif offered.bias_was_written:
            add_bias(self.expression, offered.bias.to(self.like.device) - self.bias)

    @torch.no_grad()
    def set_weight(self, weight: Tensor, bias: Tensor | None) -> None:
        """Give the factors values whose product is this weight and bias, to rounding.

        Args:
            weight: in the shape of the layer's weight.
            bias: in the shape of the layer's bias, None where it has none.

        Raises:
            ValueError: if the rate or the block makes it impossible.
        """
        reason = kernel_refusal(self.expression)
        if reason:
            raise ValueError(reason)
        weight, bias = (t if t is None else t.to(self.like.device).double() for t in (weight, bias))
        self.expression.set_kernel(self._turn(as_kernel(weight)), bias)

    def _contract(self) -> nn.Module:
        self.take_offered()
        with torch.no_grad():
            weight, bias = self.expression.fold(torch.float64)
        dtype = self.like.dtype
        weight = self._as_layer_weight(self._turn(weight)).to(dtype).contiguous()
        return self._as_layer(weight, None if bias is None else bias.to(dtype))

    def stand_in(self) -> nn.Module:
        """The layer it came from, its parameters of no value: to be looked at, not to be run."""
        shape = self._layer_weight_shape
        bias = self.like.new_empty(self.site.out_channels) if self._has_bias else None
        return self._as_layer(self.like.new_empty(shape), bias)

    def _as_layer(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        trained = {
            kind: any(
                p.requires_grad
                for name, p in self.expression.named_parameters()
                if name.endswith('bias') == (kind == 'bias')
            )
            for kind in ('weight', 'bias')
        }
        layer = _without_parameters(self._layer[0])
        layer.weight = nn.Parameter(weight, trained['weight'])
        if self._has_bias:
            layer.bias = nn.Parameter(bias, trained['bias'])
        return layer.train(self.training)

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load factors; where they are of another block or rate, factorise the compact weight.

        An expanded checkpoint holds both. A layer of another shape is left as it is and reported,
        as torch does with any.

        Raises:
            ValueError: if the rate or block makes it impossible.
        """
        self.take_offered()
        weight, bias = (state_dict.pop(prefix + kind, None) for kind in ('weight', 'bias'))
        mine = self.state_dict(prefix=prefix)
        held = {key: tuple(value.shape) for key, value in state_dict.items()}
        fits = held == {key: tuple(value.shape) for key, value in mine.items()}
        if not fits and (held or weight is not None):
            shape = None if weight is None else tuple(weight.shape)
            own = tuple(self._layer_weight_shape)
            if shape == own and (bias is not None) == self._has_bias:
                self._set_loaded_weight(weight, bias, prefix.rstrip('.'))
            else:
                found = 'factors of other shapes' if shape is None else f'a weight of shape {shape}'
                found += '' if shape is None else f' with{"out" * (bias is None)} bias'
                error_msgs.append(
                    f'size mismatch for {prefix}weight: the checkpoint holds {found}, the layer '
                    f'has {own} with{"out" * (not self._has_bias)} bias'
                )
            state_dict.clear()
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def _set_loaded_weight(self, weight: Tensor, bias: Tensor | None, name: str) -> None:
        try:
            self.set_weight(weight, bias)
        except ValueError as error:
            raise ValueError(
                f'{name}: a compact weight cannot be loaded into this expanded layer: {error}; or '
                'start from the initialisation instead of the checkpoint'
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


def _cast(affine: Affine, dtype: torch.dtype) -> Affine:
    weight, bias = affine
    return weight.to(dtype), None if bias is None else bias.to(dtype)
