"""The folded kernel of a unit, computed once and kept until a factor changes.

A fold depends on the factors, not on the batch. It is one node of the autograd graph, and all
forward passes up to the next optimizer step share it. The engine sums the gradients of the folded
kernel, and the node computes the factors' gradients from the sum.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook

from .algebra import Affine
from .batch_sample import BatchSample
from .capture import CapturedProduct, captured
from .compat import parameters_of, version
from .expression import Chain
from .product import ChainProduct, fits, memory

Product = ChainProduct | CapturedProduct

PullBack = Callable[..., Sequence[Tensor | None]]
"""A function from the gradients of kernel and bias to the gradients of the parameters."""


class KernelGradient:
    """The gradient of a folded kernel and bias, summed over backward passes.

    Attributes:
        enabled: whether the gradient is kept; off by default.
        delivered: whether a backward pass has run since the factors were last folded.
        complete: whether all forward passes with gradients since ``take`` used the folded kernel.
    """

    def __init__(self):
        self.enabled = self.delivered = False
        self.complete = True
        self.clear()

    def clear(self) -> None:
        """Reset the sum."""
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def take(self) -> list[Tensor]:
        """Return the gradients of kernel and bias and reset them; [] if they are incomplete."""
        found = [g for g in (self._weight, self._bias) if self.complete and g is not None]
        self.complete = True
        self.clear()
        return found

    def add(self, weight: Tensor, bias: Tensor | None) -> None:
        """Record a backward pass, and add its gradients if enabled."""
        self.delivered = True
        if self.enabled:
            self._weight = weight if self._weight is None else self._weight + weight
            if bias is not None:
                self._bias = bias if self._bias is None else self._bias + bias


def fold_layer(
    expression: nn.Module, turn: Callable[[Tensor], Tensor], sample: BatchSample | None = None
) -> Affine:
    """Return the kernel and bias of a layer in the dtype of its factors; differentiable.

    The computation is in float32 or float64, and outside autocast, because a product of rounded
    factors drifts.

    Args:
        expression: the expression to fold.
        turn: converts the expression's kernel to the layer's.
        sample: the batch sample from which norms take statistics; None: running statistics.
    """
    like = next(expression.parameters())
    wide = like.dtype if like.dtype == torch.float64 else torch.float32
    with torch.autocast(like.device.type, enabled=False):
        weight, bias = expression.fold(wide, sample)
    return turn(weight).to(like.dtype), None if bias is None else bias.to(like.dtype)


@dataclass(frozen=True)
class _Folded:
    affine: Affine
    state: tuple
    has_graph: bool
    # No other tensor gets the factors' memory or id while the state is compared.
    held: tuple[tuple[Tensor, torch.UntypedStorage], ...]


class FoldedKernel:
    """The fold of an expression, kept until a factor changes.

    Attributes:
        captures: whether a chain on a GPU is folded by CUDA graphs; off by default.
        gradient: the gradient of the kernel, if it is kept.

    Args:
        expression: an expression that is linear in eval mode.
        turn: converts the expression's kernel to the layer's, or back, by moving values.
        as_memory_format: converts a kernel to the memory format of the network.
    """

    def __init__(
        self,
        expression: nn.Module,
        turn: Callable[[Tensor], Tensor],
        as_memory_format: Callable[[Tensor], Tensor],
    ):
        _count_optimizer_steps()
        self._expression, self._turn, self._as_memory_format = expression, turn, as_memory_format
        self.gradient = KernelGradient()
        self.captures = False
        self._kept: _Folded | None = None
        self._product: tuple[tuple, Product | None] | None = None

    def forget(self) -> None:
        """Fold again at the next use; call it after changes that leave no trace on factors."""
        self._kept = None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the factors."""
        return self._expression.parameters()

    @torch.compiler.disable
    def get(self) -> Affine:
        """Return the kernel and bias; differentiable if gradients are enabled."""
        parameters = list(self._expression.parameters())
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        state = self._state(parameters)
        kept = self._kept
        if self._has_new_step(parameters):
            kept = None
            self.gradient.clear()
        if kept is None or kept.state != state or (wanted and not kept.has_graph):
            self.gradient.delivered = False
            affine = _Fold.apply(self, *parameters) if wanted else self.fold()[0]
            tensors = (*parameters, *self._expression.buffers())
            held = tuple((tensor, tensor.untyped_storage()) for tensor in tensors)
            self._kept = kept = _Folded(affine, state, wanted, held)
        return kept.affine

    def _has_new_step(self, parameters: list[nn.Parameter]) -> bool:
        """Return whether gradients were computed and reset, so that factors may have changed.

        A loop without an optimizer that writes to ``.data`` leaves no other trace.
        """
        return self.gradient.delivered and all(p.grad is None for p in parameters)

    def _state(self, parameters: list[nn.Parameter]) -> tuple:
        """Return a state that changes if a factor is trained, written, replaced or moved."""
        tensors = [*parameters, *self._expression.buffers()]
        # A fused optimizer does not change the versions of its parameters: count steps too.
        return (
            _optimizer_steps,
            torch.is_inference_mode_enabled(),
            *((id(t), t.data_ptr(), version(t), t.dtype, t.requires_grad) for t in tensors),
        )

    @torch.no_grad()
    def fold(self) -> tuple[Affine, PullBack]:
        """Return the kernel and bias without a graph, and a function that pulls gradients back."""
        expression = self._expression
        with torch.autocast(next(expression.parameters()).device.type, enabled=False):
            product = self._chain_product()
            if product is not None:
                (weight, bias), saved = product.multiply()
                affine = self._as_memory_format(self._turn(weight)), bias
                # The lambda must not hold this object, which keeps the result: see ``_Fold``.
                turn = self._turn
                return affine, lambda weight, bias: product.pull_back(saved, turn(weight), bias)
            with _detached(expression) as parameters, torch.enable_grad(), _saved_as_usual():
                weight, bias = fold_layer(expression, self._turn)
                weight = self._as_memory_format(weight)
        affine = weight.detach(), None if bias is None else bias.detach()
        return affine, _graph_pull_back((weight, bias), parameters)

    def pull_back(self, weight: Tensor | None, bias: Tensor | None) -> dict[nn.Parameter, Tensor]:
        """Return the trained factors' gradients for given gradients of kernel and bias.

        Args:
            weight: gradient of the layer's kernel ``(n, m / groups, kh, kw)``; None: zero.
            bias: gradient of the bias ``(n,)``; None: zero.
        """
        return self._factor_gradients(*self.fold(), weight, bias)

    def decay_gradients(self, decay: float) -> dict[nn.Parameter, Tensor]:
        """Return the trained factors' gradients of half the decay times the kernel's square sum."""
        (weight, bias), pull_back = self.fold()
        return self._factor_gradients((weight, bias), pull_back, decay * weight, None)

    def _factor_gradients(
        self, affine: Affine, pull_back: PullBack, weight: Tensor | None, bias: Tensor | None
    ) -> dict[nn.Parameter, Tensor]:
        gradients = [
            torch.zeros_like(value) if gradient is None else gradient.to(value)
            for value, gradient in zip(affine, (weight, bias), strict=True)
            if value is not None
        ]
        found = pull_back(*gradients, *[None] * (2 - len(gradients)))
        return {
            parameter: gradient
            for parameter, gradient in zip(self._expression.parameters(), found, strict=True)
            if gradient is not None and parameter.requires_grad
        }

    def _chain_product(self) -> Product | None:
        """Return the product that views the present factors, or None if it does not fit them."""
        chain = self._expression
        if type(chain) is not Chain or chain.groups > 1:
            return None
        place = memory(chain)
        if self._product is None or self._product[0] != place:
            product = ChainProduct(chain) if fits(chain) else None
            if product is not None and self.captures and chain[0].weight.is_cuda:
                product = captured(product)
            self._product = place, product
        return self._product[1]


class _Fold(torch.autograd.Function):
    """The fold of parameters to kernel and bias; backward can run several times."""

    @staticmethod
    def forward(ctx: Any, kernel: FoldedKernel, *parameters: nn.Parameter) -> Affine:
        affine, ctx.pull_back = kernel.fold()
        ctx.parameters, ctx.versions = parameters, [version(p) for p in parameters]
        # The garbage collector does not see cycles through the graph. So ctx must not hold the
        # FoldedKernel, which keeps the result.
        ctx.gradient = kernel.gradient
        return affine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.versions != [version(p) for p in ctx.parameters]:
            raise RuntimeError(
                'a factor was modified in place between the forward and the backward pass; '
                'run the forward pass again'
            )
        with torch.autocast(weight.device.type, enabled=False):
            ctx.gradient.add(weight, bias)
            return None, *ctx.pull_back(weight, bias)


@contextmanager
def _detached(expression: nn.Module) -> Iterator[list[Tensor]]:
    """Replace an expression's parameters by detached copies, which share memory.

    With the parameters themselves, hooks that a user has registered would run twice.
    """
    kept, copies = [], []
    for module in expression.modules():
        for name, parameter in parameters_of(module).items():
            if parameter is not None:
                kept.append((module, name, parameter))
                copies.append(parameter.detach().requires_grad_(parameter.requires_grad))
                parameters_of(module)[name] = copies[-1]
    try:
        yield copies
    finally:
        for module, name, parameter in kept:
            parameters_of(module)[name] = parameter


def _saved_as_usual() -> saved_tensors_hooks:
    """Save tensors as usual: the second forward pass of activation checkpointing does not fold."""
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _graph_pull_back(affine: Affine, parameters: list[Tensor]) -> PullBack:
    trained = [p for p in parameters if p.requires_grad]

    def pull_back(*gradients: Tensor | None) -> list[Tensor | None]:
        pairs = [
            (value, gradient)
            for value, gradient in zip(affine, gradients, strict=True)
            if value is not None and value.requires_grad
        ]
        values, given = zip(*pairs, strict=True)
        found = iter(
            torch.autograd.grad(values, trained, given, retain_graph=True, allow_unused=True)
        )
        return [next(found) if p.requires_grad else None for p in parameters]

    return pull_back


_optimizer_steps = 0


def _count(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


@cache
def _count_optimizer_steps() -> None:
    """Count optimizer steps from the first call on."""
    register_optimizer_step_post_hook(_count)
