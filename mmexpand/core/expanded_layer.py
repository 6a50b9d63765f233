"""What the expanded layers share: linear factors in the place of one layer (Sec. 3)."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import UserValueError
from .algebra import Affine
from .batch_sample import BatchSample
from .blocks import build_expression
from .blocks.nonlinear import NonlinearChain
from .blocks.upgrade import upgraded
from .compat import parameters_of
from .expression import (
    Chain,
    Norm,
    Shape,
    add_bias,
    apply_macs,
    as_kernel,
    factors_of,
    fold_macs,
    kernel_refusal,
)
from .folded import FoldedKernel, fold_layer
from .folded_parameter import FoldedParameter
from .layer_spec import SPEC_KEY, LayerSpec
from .offer import Offer
from .strategies import STRATEGIES, choose

FORWARDS = tuple(STRATEGIES)

FACTORS = 'factors'
"""Where a chain is in a unit; the expression of another block is under the block's name."""


class ExpandedLayer(nn.Module):
    """What both units share: an expression in the place of a layer, and the layer it stands for.

    Attributes:
        method: the block: a key of ``BLOCKS``.
        spec: the layer's.
        factors: of 'cl', 'ck' and 'fc': the chain, the one applied first in front. The expression
            of any other block, or of a transposed convolution, is an attribute of the block's name.
        folded_parameter: what the network sees of the kernel where compact-size gradients are on,
            else None.
        given: None, or a list that records the weight and bias that were given last; not copied.
    """

    def __init__(self, layer: nn.Module, block: str, spec: LayerSpec, forward: str):
        super().__init__()
        self.method, self.spec = block, spec
        expression = build_expression(block, spec)
        # A state dict tells by the name that a layer is transposed.
        chain = isinstance(expression, Chain) and spec.upsampling is None
        self._root = FACTORS if chain else block
        self.add_module(self._root, expression)
        if self._root != FACTORS:
            # A state dict alone is to say what it is the expression of.
            expression.register_buffer(SPEC_KEY, spec.record().to(spec.like.device))
        self._norms = [module for module in expression.modules() if isinstance(module, Norm)]
        self.forward_order = forward
        # The layer without its parameters, in a tuple so that it is no submodule: contraction
        # gives back this class with these attributes and hooks.
        self._layer = (_without_parameters(layer),)
        self.kernel = self._new_kernel()
        self.folded_parameter: FoldedParameter | None = None
        self._offered: Offer | None = None
        self.given: list[tuple[Tensor, Tensor | None]] | None = None
        self.train(layer.training)

    @property
    def expression(self) -> nn.Module:
        """What the kernel is computed from."""
        return self.get_submodule(self._root)

    @property
    def rate(self) -> float:
        """The expansion rate."""
        return self.spec.rate

    @property
    def groups(self) -> int:
        """The number of groups."""
        return self.spec.groups

    @property
    def has_kernel(self) -> bool:
        """Whether there is a kernel; not so with ReLU between the factors."""
        return not isinstance(self.expression, NonlinearChain)

    @property
    def is_linear(self) -> bool:
        """Whether the unit is a layer with the folded kernel while it trains, too."""
        return self.has_kernel and not self._norms

    @property
    def forward_order(self) -> str:
        """``forward``: 'layerwise', 'folded' or 'auto'."""
        return self._forward_order

    @forward_order.setter
    def forward_order(self, forward: str) -> None:
        self._forward_order = forward
        self._strategy = choose(forward, self.has_kernel, bool(self._norms))

    def _new_kernel(self) -> FoldedKernel:
        return FoldedKernel(self.expression, self.spec.turn, self._as_memory_format)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: the same shapes in and out as the layer it stands for.

        In eval mode the folded kernel is applied whatever ``forward`` says: the compact
        computation. In training mode norms in branches take their statistics from a part of the
        pixels where the block runs folded, from all of them where it runs branch by branch.
        """
        return self._run(input)

    def _run(self, x: Tensor, *call: object) -> Tensor:
        """Apply the layer; ``call``: what the call says beside the input."""
        self.take_offered()
        if self.training or not self.has_kernel:
            return self._strategy(self, x, *call)
        return self._apply_kernel(x, *self.folded(), *call)

    @property
    def takes_statistics(self) -> bool:
        """Whether norms take statistics of the batch in training mode."""
        return any(norm.norm.training for norm in self._norms)

    @torch.no_grad()
    def anchor_norms(self, input: Tensor, *call: object) -> None:
        """Anchor norms in branches at the statistics of a batch; the layer stays what it computes.

        After ``set_weight`` the block is the given layer in eval mode, and its norms know nothing
        of the data. The first batch in training mode is what they are anchored at: normalised by
        its own statistics, taken from the pixels that training takes them from, it gives what
        the given layer does. Under ``torch.distributed`` the batches of all processes are pooled.

        Args:
            input: of the layer.
            call: what the call says beside it.
        """
        if all(norm.is_anchored for norm in self._norms):
            return
        x = input.to(self.like.dtype)
        for norm in self._norms:
            norm.anchoring = True
        try:
            with torch.autocast(x.device.type, enabled=False):
                layerwise = self.forward_order == 'layerwise'
                sample = None if layerwise else self._sample(x, *call)
                self._apply_branches(x, *call) if sample is None else self.fold(sample)
        finally:
            for norm in self._norms:
                norm.anchoring = False

    def freeze_norms(self) -> None:
        """Keep the statistics of norms in branches as they are, in training mode too.

        The block is linear then: training computes exactly the layer that is deployed.
        """
        for norm in self._norms:
            norm.is_frozen = True
        self.train(self.training)

    def forward_layerwise(self, input: Tensor, *call: object) -> Tensor:
        """Apply one factor after another, in any mode: the paper's chain."""
        self.take_offered()
        return self._apply_branches(input, *call)

    def count_macs(
        self, input_shape: Sequence[int], folded: bool, with_folding: bool = True
    ) -> int:
        """Multiply-accumulate operations of a forward pass.

        Args:
            input_shape: of the layer's input.
            folded: whether one kernel is applied, or one factor after another.
            with_folding: whether to count the products of factors, not only their application.
        """
        if not folded:
            batch, size = self._padded_size(input_shape)
            return batch * apply_macs(self.expression, size)[0]
        out, inside, height, width = self.expression.shape
        applied = self._layer_pixels(input_shape) * out * inside * height * width
        return applied + with_folding * fold_macs(self.expression)

    def _padded_size(self, input_shape: Sequence[int]) -> tuple[int, tuple[int, int]]:
        """The batch, and the image as the expression gets it."""
        raise NotImplementedError

    def _layer_pixels(self, input_shape: Sequence[int]) -> int:
        """Pixels at which the layer applies its whole kernel, batch included."""
        raise NotImplementedError

    def _apply_kernel(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *call: object
    ) -> Tensor:
        """Apply the layer with this kernel."""
        raise NotImplementedError

    def _apply_branches(self, x: Tensor, *call: object) -> Tensor:
        """Apply the expression, layer by layer."""
        raise NotImplementedError

    def _sample(self, x: Tensor, *call: object) -> BatchSample | None:
        """Return the pixels that norms are measured at where the block runs folded."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The folded kernel, differentiable, in the shape of the layer's weight.

        Between ``offer_weight`` and the first use it is a tensor to be written to.
        """
        if self._offered is not None:
            return self._offered.weight
        self._check_kernel()
        return self.spec.as_weight(self._read()[0])

    @property
    def bias(self) -> Tensor | None:
        """The folded bias, differentiable, in the shape of the layer's; None where it has none."""
        if self._offered is not None:
            return self._offered.bias
        self._check_kernel()
        return self._read()[1] if self.spec.bias else None

    def _check_kernel(self) -> None:
        # To those who ask first, as initialisations do, it is a module without a weight.
        if not self.has_kernel:
            raise AttributeError(kernel_refusal(self.expression))

    def _read(self) -> Affine:
        """What a module that reads the weight, in place of calling the layer, computes with."""
        if self.folded_parameter is not None and self.training and torch.is_grad_enabled():
            return self.folded_parameter.refresh()
        return self.fold()

    @property
    def factor_shapes(self) -> list[Shape]:
        """Kernel shapes of the factors; of a chain the one applied first in front."""
        return [tuple(as_kernel(factor.weight).shape) for factor in factors_of(self.expression)]

    @property
    def like(self) -> Tensor:
        """A parameter: of the device and dtype of all."""
        return next(self.expression.parameters())

    def folded(self) -> Affine:
        """The kernel and bias that the layer is applied with; kept until a factor changes."""
        if self.training and self.folded_parameter is not None:
            return self.folded_parameter.refresh()
        return self.kernel.get()

    def fold(self, sample: BatchSample | None = None) -> Affine:
        """The kernel and bias, 4-dimensional, folded from the present factors."""
        return fold_layer(self.expression, self.spec.turn, sample)

    def _as_memory_format(self, kernel: Tensor) -> Tensor:
        """Give a kernel the memory format that the network runs in."""
        return kernel

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode, and forget the kept product.

        Swapping weights through ``Tensor.data``, as EMA hooks do around a validation, leaves no
        trace on a parameter, but is followed by a change of mode.
        """
        self.forget_products()
        return super().train(mode)

    def forget_products(self) -> None:
        """Fold anew at the next use: for changes of factors that leave no trace on them."""
        self.kernel.forget()

    def __getstate__(self) -> dict:
        """Pickle and deep-copy without kept products: a copy is not part of a reducer."""
        return {**self.__dict__, 'kernel': None, 'folded_parameter': None, 'given': None}

    def __setstate__(self, state: dict) -> None:
        """Take up a pickled or copied state; the kernel is folded again."""
        super().__setstate__(state)
        self.kernel = self._new_kernel()

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
            if self.given:
                self.given.clear()  # An initialisation's is random, as a rule.
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
            raise UserValueError(reason)
        if self.given is not None:
            self.given[:] = [(weight, bias)]
        weight, bias = (t if t is None else t.to(self.like.device).double() for t in (weight, bias))
        for norm in self._norms:
            norm.become_identity()
        self.expression.set_kernel(self.spec.turn(as_kernel(weight)), bias)

    def _contract(self) -> nn.Module:
        self.take_offered()
        with torch.no_grad():
            weight, bias = self.expression.fold(torch.float64)
        dtype = self.like.dtype
        weight = self.spec.as_weight(self.spec.turn(weight)).to(dtype).contiguous()
        return self._as_layer(
            self._as_memory_format(weight), None if bias is None else bias.to(dtype)
        )

    def stand_in(self) -> nn.Module:
        """The layer it came from, its parameters of no value: to be looked at, not to be run."""
        bias = self.like.new_empty(self.spec.out_channels) if self.spec.bias else None
        return self._as_layer(self.like.new_empty(self.spec.weight_shape), bias)

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
        if self.spec.bias:
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
        present = upgraded(state_dict)
        if present is not state_dict:
            state_dict.clear()
            state_dict.update(present)
        mine = self.state_dict(prefix=prefix)
        held = {key: tuple(value.shape) for key, value in state_dict.items()}
        fits = held == {key: tuple(value.shape) for key, value in mine.items()}
        for norm in self._norms:
            norm.is_anchored |= fits
        shape = None if weight is None else tuple(weight.shape)
        own = self.spec.weight_shape
        if fits and shape == own and self.given is not None:
            self.given[:] = [(weight, bias)]
        if not fits and (held or weight is not None):
            if shape == own and (bias is not None) == self.spec.bias:
                self._set_loaded_weight(weight, bias, prefix.rstrip('.'))
            else:
                found = 'factors of other shapes' if shape is None else f'a weight of shape {shape}'
                found += '' if shape is None else f' with{"out" * (bias is None)} bias'
                error_msgs.append(
                    f'size mismatch for {prefix}weight: the checkpoint holds {found}, the layer '
                    f'has {own} with{"out" * (not self.spec.bias)} bias'
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
        except UserValueError as error:
            raise UserValueError(
                f'{name}: a compact weight cannot be loaded into this expanded layer: {error}; or '
                'start from the initialisation instead of the checkpoint'
            ) from None

    def extra_repr(self) -> str:
        """What the unit stands for."""
        block = self.spec.options.label(self.method)
        return f'{self._layer[0]}, method={block!r}, rate={self.rate}'


def _without_parameters(layer: nn.Module) -> nn.Module:
    bare = copy.copy(layer)
    # Its own dictionaries of hooks and the like: a shallow copy shares them.
    bare.__dict__.update((k, v.copy()) for k, v in layer.__dict__.items() if isinstance(v, dict))
    parameters_of(bare).update(dict.fromkeys(parameters_of(layer)))
    return bare
