"""The base class of units: an expression in the place of one layer (Sec. 3)."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserValueError
from .algebra import Affine, as_kernel
from .batch_sample import BatchSample
from .blocks import build_expression
from .blocks.nonlinear import NonlinearChain
from .compat import parameters_of
from .expression import (
    Chain,
    Norm,
    Shape,
    factors_of,
)
from .folded import FoldedKernel, fold_layer
from .folded_parameter import FoldedParameter
from .layer_spec import SPEC_KEY, LayerSpec
from .loading import load_compact, note_loaded
from .offer import Offer
from .strategies import choose

FACTORS = 'factors'
"""Attribute of a unit that holds a chain; another expression is under its block's name."""


class ExpandedLayer(nn.Module):
    """The base class of units: an expression, and the layer that it replaces.

    Attributes:
        method: the block: a key of ``BLOCKS``.
        spec: the layer spec.
        factors: for 'cl', 'ck' and 'fc' the factors in the order of application. The expression of
            another block, or of a transposed convolution, is the attribute with the block's name.
        folded_parameter: the folded kernel as a parameter if compact-size gradients are on, or
            None.
        given: None, or a list with the weight and bias that were set last; not copied.
    """

    def __init__(self, layer: nn.Module, block: str, spec: LayerSpec, forward: str):
        super().__init__()
        self.method, self.spec = block, spec
        expression = build_expression(block, spec)
        # State dicts describe themselves: a transposed layer's chain is under its block's name.
        chain = isinstance(expression, Chain) and spec.upsampling is None
        self._root = FACTORS if chain else block
        self.add_module(self._root, expression)
        if self._root != FACTORS:
            # Store the spec so that state dicts describe themselves.
            expression.register_buffer(SPEC_KEY, spec.record().to(spec.like.device))
        self._norms = [module for module in expression.modules() if isinstance(module, Norm)]
        self.forward_order = forward
        # Contraction returns this layer, with its class, attributes and hooks. A tuple keeps it out
        # of the submodules.
        self._layer = (_without_parameters(layer),)
        self.kernel = self._new_kernel()
        self.folded_parameter: FoldedParameter | None = None
        self._offered: Offer | None = None
        self._macs: dict[tuple, int] = {}
        self.given: list[tuple[Tensor, Tensor | None]] | None = None
        self.train(layer.training)

    @property
    def expression(self) -> nn.Module:
        """Return the expression, from which the kernel is computed."""
        return self.get_submodule(self._root)

    @property
    def rate(self) -> float:
        """Return the expansion rate."""
        return self.spec.rate

    @property
    def groups(self) -> int:
        """Return the number of groups."""
        return self.spec.groups

    @property
    def has_kernel(self) -> bool:
        """Return whether the expression has a kernel: not with ReLU between the factors."""
        return not isinstance(self.expression, NonlinearChain)

    @property
    def is_linear(self) -> bool:
        """Return whether the unit equals a layer with the folded kernel in training mode too."""
        return self.has_kernel and not self._norms

    @property
    def forward_order(self) -> str:
        """Return ``forward``: 'layerwise', 'folded' or 'auto'."""
        return self._forward_order

    @forward_order.setter
    def forward_order(self, forward: str) -> None:
        self._forward_order = forward
        self._strategy = choose(forward, self.has_kernel, bool(self._norms))

    def _new_kernel(self) -> FoldedKernel:
        return FoldedKernel(self.expression, self.spec.turn, self._as_memory_format)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the unit; shapes of input and output are the replaced layer's.

        In eval mode the unit applies the folded kernel, whatever ``forward`` is. In training mode
        norms in branches take their statistics from a batch sample if the block runs folded, and
        from all pixels if it runs layerwise.
        """
        return self._run(input)

    def _run(self, x: Tensor, *call: object) -> Tensor:
        """Apply the unit; ``call``: further arguments of the layer's forward."""
        self.take_offered()
        if self.training or not self.has_kernel:
            return self._strategy(self, x, *call)
        return self._apply_kernel(x, *self.folded(), *call)

    @property
    def takes_statistics(self) -> bool:
        """Return whether norms currently take statistics of the batch."""
        return any(norm.norm.training for norm in self._norms)

    @property
    def is_anchored(self) -> bool:
        """Return whether all norms have statistics of data."""
        return all(norm.is_anchored for norm in self._norms)

    @torch.compiler.disable
    @torch.no_grad()
    def anchor_norms(self, input: Tensor, *call: object) -> None:
        """Anchor norms in branches at the statistics of a batch; the function stays the same.

        After ``set_weight`` the block equals the given layer in eval mode, but its norms have no
        statistics of data. The first batch in training mode anchors them, with the same pixels
        that training uses: normalised by its own statistics, this batch gives the layer's output.
        Under ``torch.distributed`` the batches of all processes are pooled.

        Args:
            input: the layer's input.
            call: further arguments of the layer's forward.
        """
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
        """Keep the statistics of norms in branches, in training mode too.

        This makes the block linear: training computes exactly the layer that is deployed.
        """
        for norm in self._norms:
            norm.is_frozen = True
        self.train(self.training)

    def forward_layerwise(self, input: Tensor, *call: object) -> Tensor:
        """Apply one factor after another, in any mode, as the paper does."""
        self.take_offered()
        return self._apply_branches(input, *call)

    def count_macs(
        self, input_shape: Sequence[int], folded: bool, with_folding: bool = True
    ) -> int:
        """Return the multiply-accumulate operations of a forward pass.

        Args:
            input_shape: the shape of the layer's input.
            folded: whether to count the folded or the layerwise forward pass.
            with_folding: whether to count the fold too, not only the application of its kernel.
        """
        key = tuple(input_shape), folded, with_folding
        if key not in self._macs:  # 'auto' asks in every forward pass.
            self._macs[key] = self._count_macs(*key)
        return self._macs[key]

    def _count_macs(self, input_shape: Sequence[int], folded: bool, with_folding: bool) -> int:
        if not folded:
            batch, size = self._padded_size(input_shape)
            return batch * self.expression.apply_macs(size)[0]
        out, inside, height, width = self.expression.shape
        applied = self._layer_pixels(input_shape) * out * inside * height * width
        return applied + with_folding * self.expression.fold_macs()

    def _padded_size(self, input_shape: Sequence[int]) -> tuple[int, tuple[int, int]]:
        """Return the batch size, and the height and width of the expression's input."""
        raise NotImplementedError

    def _layer_pixels(self, input_shape: Sequence[int]) -> int:
        """Return the number of pixels, of the whole batch, where the layer applies its kernel."""
        raise NotImplementedError

    def _apply_kernel(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *call: object
    ) -> Tensor:
        """Apply the layer with this kernel and bias."""
        raise NotImplementedError

    def _apply_branches(self, x: Tensor, *call: object) -> Tensor:
        """Apply the expression layerwise."""
        raise NotImplementedError

    def _sample(self, x: Tensor, *call: object) -> BatchSample | None:
        """Return the batch sample for norms in a folded block; None: run layerwise instead."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """Return the folded kernel, differentiable, in the shape of the layer's weight.

        Between ``offer_weight`` and the first use it is a tensor that may be written to.
        """
        if self._offered is not None:
            return self._offered.weight
        self._check_kernel()
        return self.spec.as_weight(self._read()[0])

    @property
    def bias(self) -> Tensor | None:
        """Return the folded bias ``(n,)``, differentiable; None if the layer has no bias."""
        if self._offered is not None:
            return self._offered.bias
        self._check_kernel()
        return self._read()[1] if self.spec.bias else None

    def _check_kernel(self) -> None:
        # An AttributeError, so that initialisations that call hasattr find no weight.
        if not self.has_kernel:
            raise AttributeError(self.expression.kernel_refusal())

    def _read(self) -> Affine:
        """Return kernel and bias for a module that reads the weight instead of calling the unit."""
        if self.folded_parameter is not None and self.training and torch.is_grad_enabled():
            return self.folded_parameter.refresh()
        return self.fold()

    @property
    def factor_shapes(self) -> list[Shape]:
        """Return the kernel shapes of the factors, in a chain in the order of application."""
        return [factor.shape for factor in factors_of(self.expression)]

    @property
    def like(self) -> Tensor:
        """Return a parameter, as a reference for device and dtype."""
        return next(self.expression.parameters())

    def folded(self) -> Affine:
        """Return the kernel and bias of the forward pass; kept until a factor changes."""
        if self.training and self.folded_parameter is not None:
            return self.folded_parameter.refresh()
        return self.kernel.get()

    def fold(self, sample: BatchSample | None = None) -> Affine:
        """Fold the present factors; return the 4-dimensional kernel and the bias."""
        if torch.is_grad_enabled():
            self.kernel.gradient.complete = False
        return fold_layer(self.expression, self.spec.turn, sample)

    def _as_memory_format(self, kernel: Tensor) -> Tensor:
        """Return a kernel in the memory format of the network."""
        return kernel

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode, and forget the kept product.

        EMA hooks swap weights around a validation through ``Tensor.data``. This leaves no trace on
        a parameter, but a change of mode follows.
        """
        self.forget_products()
        return super().train(mode)

    def forget_products(self) -> None:
        """Fold again at the next use; call it after changes that leave no trace on factors."""
        self.kernel.forget()

    def __getstate__(self) -> dict:
        """Return the state without kept products and ``given``; a copy is not part of a reducer."""
        if self._offered is not None and self._offered.was_written:
            # A copy must not take the written values after its factors were averaged.
            self.take_offered()
            self.offer_weight()
        return {**self.__dict__, 'kernel': None, 'folded_parameter': None, 'given': None}

    def __setstate__(self, state: dict) -> None:
        """Restore a pickled or copied state; the kernel is folded again."""
        super().__setstate__(state)
        self.kernel = self._new_kernel()

    @torch.no_grad()
    def offer_weight(self) -> None:
        """Make ``weight`` and ``bias`` writable for a network's own ``init_weights``.

        At the first use of the unit, ``take_offered`` sets the factors to the written values. This
        has no effect on a unit without a kernel.
        """
        if not self.has_kernel:
            return
        self._offered = Offer(*(None if t is None else t.clone() for t in (self.weight, self.bias)))

    @torch.no_grad()
    def take_offered(self) -> None:
        """Set the factors to the values that were written to ``weight`` and ``bias``, if any.

        Raises:
            ValueError: if the rate makes it impossible.
        """
        offered, self._offered = self._offered, None
        if offered is None:
            return
        # Moving the unit to a GPU does not move the offered tensors.
        if offered.weight_was_written and self.is_linear:
            self.set_weight(offered.weight, offered.bias)
            if self.given:
                self.given.clear()  # Initial weights are usually random, not given.
        elif offered.bias_was_written:
            self.expression.add_bias(offered.bias.to(self.like.device) - self.bias)

    @torch.no_grad()
    def set_weight(self, weight: Tensor, bias: Tensor | None) -> None:
        """Set the factors such that they fold to this weight and bias, up to rounding.

        Args:
            weight: the weight, in the shape of the layer's.
            bias: the bias ``(n,)``, or None if the layer has no bias.

        Raises:
            ValueError: if the rate or the block makes it impossible.
        """
        reason = self.expression.kernel_refusal()
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
        """Return the replaced layer with uninitialised parameters, for its attributes only."""
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

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *others: Any) -> None:
        """Load factors; factorise the compact weight if factors have another block or rate.

        An expanded checkpoint contains both. A layer with another shape is left unchanged and
        reported as a size mismatch, as torch does.

        Raises:
            ValueError: if the rate or block makes it impossible.
        """
        self.take_offered()
        weight, bias = (state_dict.pop(prefix + kind, None) for kind in ('weight', 'bias'))
        held, own = (_shapes(values) for values in (state_dict, self.state_dict(prefix=prefix)))
        if held == own:
            note_loaded(self, state_dict, prefix, weight, bias)
        # A part of the unit's values, as the statistics that mmdet's SyncNormHook loads, is loaded.
        elif weight is not None or not held.items() <= own.items():
            load_compact(self, weight, bias, prefix, *others[1:])
            state_dict.clear()
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        """Return the replaced layer, method and rate, for printing."""
        block = self.spec.options.label(self.method)
        return f'{self._layer[0]}, method={block!r}, rate={self.rate}'


def _without_parameters(layer: nn.Module) -> nn.Module:
    bare = copy.copy(layer)
    # A shallow copy shares the dictionaries of hooks, parameters and buffers: copy them too.
    bare.__dict__.update((k, v.copy()) for k, v in layer.__dict__.items() if isinstance(v, dict))
    parameters_of(bare).update(dict.fromkeys(parameters_of(layer)))
    return bare


def _shapes(state_dict: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state_dict.items()}
