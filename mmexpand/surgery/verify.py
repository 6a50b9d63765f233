"""Comparison of an expanded model with its contraction: layer by layer and end to end."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ..core.compat import tree_map_only
from ..core.units import ExpandedLinear
from ..errors import UserError, UserValueError
from .compat import tf32_switches
from .expand import ExpandedLayer, named_units
from .topk_replay import TopkReplay
from .train_mode import eval_mode

Forward = Callable[[nn.Module], Any]
"""A function that runs a model and returns tensors in nested lists, tuples and dicts."""

IN_MODEL = 'in the model'
ON_CAPTURED = 'on captured input'
ON_RANDOM = 'on random input'


class VerificationError(UserError, RuntimeError):
    """A difference between two models that should be equal; the message names the layers."""


@dataclass(frozen=True)
class Verification:
    """The largest errors of a comparison, relative to the largest magnitude of the output.

    Attributes:
        layers: error of each unit against its contracted layer on the same input, by layer name.
        output: error of the models' outputs.
        how: input of each layer: 'in the model' for the forward pass whose outputs are compared,
            'on captured input' for another step, or 'on random input'.
    """

    layers: dict[str, float]
    output: float
    how: dict[str, str]

    @property
    def worst_layer(self) -> str:
        """Return the name of the layer with the largest error."""
        return max(self.layers, key=self.layers.get)

    @property
    def max_error(self) -> float:
        """Return the largest error of layers and outputs."""
        return max(self.output, *self.layers.values())


TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest relative error that rounding can cause, by the dtype of the model."""


@torch.no_grad()
def verify(
    expanded: nn.Module,
    compact: nn.Module,
    forward: Forward,
    tolerance: float | None = None,
    steps: Iterable[Forward] = (),
) -> Verification:
    """Compare an expanded model, run layerwise, with its contraction.

    The layerwise forward pass shares no code with folding, so that a wrong fold shows. Each unit is
    compared with its contracted layer: on its input in ``forward`` or else in one of ``steps``,
    or on random input if none reaches it. Rounding may change selections by score in ``forward``
    (top-k and others), so that both models use the expanded model's selections: their scores are
    compared, and the outputs for the same selection.

    Args:
        expanded: a model with units. It runs in eval mode and is not changed.
        compact: the contracted model, which runs in eval mode and is not changed.
        forward: runs either model on the same input.
        tolerance: largest allowed relative error; None uses ``TOLERANCES`` by dtype.
        steps: other ways to run the expanded model, for units that ``forward`` does not reach;
            their outputs are ignored.

    Returns:
        The errors by layer and end to end.

    Raises:
        VerificationError: if an error is larger than the tolerance or not finite, if the outputs
            differ in structure, or if the expanded model's values are not finite.
        ValueError: if the model has no units or ``forward`` returns no tensor.
    """
    units = named_units(expanded)
    if not units:
        raise UserValueError('the model has no expanded layer to verify; expand it first')
    like = next(iter(units.values())).like
    if tolerance is None:
        tolerance = TOLERANCES[like.dtype]
    layers = _Layers(units, compact, tolerance)
    with ExitStack() as stack:
        for context in (eval_mode(expanded), eval_mode(compact), full_precision()):
            stack.enter_context(context)
        for unit in units.values():
            # Activation checkpointing may have set another forward on a unit.
            stack.enter_context(mock.patch.object(unit, 'forward', unit.forward_layerwise))
        replay = TopkReplay()
        with layers.compared(IN_MODEL), replay, _same_draws(like):
            reference = forward(expanded)
        with replay.repeated(), _same_draws(like):
            output = forward(compact)
        for step in steps:
            if layers.missing:
                with layers.compared(ON_CAPTURED):
                    step(expanded)
        for name in layers.missing:
            x = _random_input(units[name])
            layers.compare(name, ON_RANDOM, units[name](x), x)
    if layers.diverged:
        raise VerificationError(
            'the expanded model computes values that are not finite, in '
            f'{", ".join(layers.diverged)}: training has diverged; lower the learning rate, or '
            'clip gradients'
        )
    errors = relative_errors(reference, output)
    if not errors:
        raise UserValueError('the forward pass returned no tensor to compare; return its outputs')
    # An infinite score marks a masked element.
    scores = [
        _error(ours[ours.isfinite()], theirs[ours.isfinite()]) for ours, theirs in replay.scores
    ]
    result = Verification(layers.errors, max(errors + scores), layers.how)
    if not result.max_error <= tolerance:
        raise VerificationError(_complaint(result, tolerance))
    return result


def _complaint(result: Verification, tolerance: float) -> str:
    wrong = {name: error for name, error in result.layers.items() if not error <= tolerance}
    ranked = sorted(wrong or result.layers, key=result.layers.get, reverse=True)
    named = ', '.join(f'{name} {result.layers[name]:.3g} ({result.how[name]})' for name in ranked)
    changed = f'relative error {result.output:.3g} end to end, allowed {tolerance:.3g}'
    if not wrong:
        return (
            f'the outputs of the compact model differ, {changed}, although each of its '
            f'{len(result.layers)} layers is equal ({ranked[0]} has the largest error, '
            f'{result.layers[ranked[0]]:.3g}): the network amplifies rounding, or draws random '
            'numbers while it predicts; disable the random numbers'
        )
    return (
        f'contraction changes the model: {changed}; {len(wrong)} of {len(result.layers)} layers '
        f'are wrong: worst layer {named}'
    )


@dataclass
class _Layers:
    """Comparisons of the units with their contracted layers."""

    units: dict[str, ExpandedLayer]
    compact: nn.Module
    tolerance: float
    errors: dict[str, float] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    diverged: list[str] = field(default_factory=list)

    @property
    def missing(self) -> list[str]:
        return [name for name in self.units if name not in self.errors]

    @contextmanager
    def compared(self, how: str) -> Iterator[None]:
        """Compare the units that run in this context and were not compared before."""

        def hook(name: str, _: ExpandedLayer, args: tuple, kwargs: dict, output: Tensor) -> None:
            self.compare(name, how, output, *args, **kwargs)

        with ExitStack() as hooks:
            for name in self.missing:
                register = self.units[name].register_forward_hook
                hooks.enter_context(register(partial(hook, name), with_kwargs=True))
            yield

    def compare(self, name: str, how: str, output: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compare an output of a unit with its contracted layer's, unless it is empty."""
        if output.numel():
            if not output.isfinite().all() and name not in self.diverged:
                self.diverged.append(name)
            layer = self.compact.get_submodule(name)
            error = _error(output, layer(*args, **kwargs))
            if error > self.tolerance:
                error = min(error, _error_in_double(self.units[name], layer, *args, **kwargs))
            self.errors[name] = max(error, self.errors.get(name, 0.0))
            self.how[name] = how


def _error_in_double(unit: ExpandedLayer, layer: nn.Module, *args: Any, **kwargs: Any) -> float:
    # If a kernel is almost zero, as in a layer initialised with zeros, a chain in single precision
    # has little more than rounding errors.
    unit, layer = copy.deepcopy(unit).double(), copy.deepcopy(layer).double()
    # An argument may be the output size of a transposed convolution.
    args, kwargs = tree_map_only(Tensor, Tensor.double, (args, kwargs))
    return _error(unit.forward_layerwise(*args, **kwargs), layer(*args, **kwargs))


def _random_input(unit: ExpandedLayer) -> Tensor:
    if isinstance(unit, ExpandedLinear):
        shape = (4, unit.in_features)
    else:
        extents = [d * (k - 1) + 1 for d, k in zip(unit.dilation, unit.kernel_size, strict=True)]
        # Padding by reflection requires more pixels than it adds.
        padding = (0, 0) if isinstance(unit.padding, str) else unit.padding
        sizes = [8 + 2 * e + p for e, p in zip(extents, padding, strict=True)]
        shape = (2, unit.in_channels, *sizes)
    # A separate generator leaves the random state unchanged.
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to(unit.like)


@contextmanager
def _same_draws(like: Tensor) -> Iterator[None]:
    """Fix the random numbers that a network draws while it predicts, as SegNeXt's head does."""
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        torch.manual_seed(0)
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Disable TF32 in this context."""
    # TF32 rounds inputs to 10 bits, which would hide errors of this size.
    switches = tf32_switches()
    kept = [(holder, name, getattr(holder, name)) for holder, name, _ in switches]
    try:
        for holder, name, off in switches:
            setattr(holder, name, off)
        yield
    finally:
        for holder, name, value in kept:
            setattr(holder, name, value)


def relative_errors(reference: Any, output: Any) -> list[float]:
    """Return the largest error of each tensor, relative to its largest magnitude.

    Args:
        reference: tensors in any nesting of lists, tuples and dicts.
        output: tensors in the same nesting.

    Raises:
        VerificationError: if they differ in structure.
    """
    if isinstance(reference, Tensor):
        if not isinstance(output, Tensor) or output.shape != reference.shape:
            raise VerificationError(
                f'outputs differ in shape: {tuple(reference.shape)} expanded, '
                f'{tuple(getattr(output, "shape", ()))} compact'
            )
        # Classes and masks hide errors: they are equal although scores differ.
        comparable = reference.is_floating_point() or reference.is_complex()
        return [_error(reference, output)] if comparable and reference.numel() else []
    if isinstance(reference, dict):
        reference, output = list(reference.values()), _values(output, list(reference))
    if isinstance(reference, (list, tuple)):
        if not isinstance(output, (list, tuple)) or len(output) != len(reference):
            raise VerificationError(
                f'outputs differ in structure: {len(reference)} values expanded, '
                f'{type(output).__name__} compact'
            )
        pairs = zip(reference, output, strict=True)
        return [error for pair in pairs for error in relative_errors(*pair)]
    return []


def _values(output: Any, keys: list) -> list:
    if not isinstance(output, dict) or list(output) != keys:
        raise VerificationError(
            f'outputs differ in structure: keys {keys} expanded, other keys compact'
        )
    return list(output.values())


def _error(reference: Tensor, output: Tensor) -> float:
    if not reference.numel():  # For example no score above a threshold.
        return 0.0
    wide = torch.complex128 if reference.is_complex() else torch.float64
    difference = (reference.to(wide) - output.to(wide)).abs().max()
    scale = reference.to(wide).abs().max()
    # An output of zeros has no scale.
    error = (difference / scale).item() if scale > 0 else difference.item()
    return error if math.isfinite(error) else math.inf
