"""Proof that two models compute the same: layer by layer and end to end, on real input."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.units import ExpandedLinear
from .swap import Unit, named_units

Forward = Callable[[nn.Module], Any]
"""Runs a model on the input; returns tensors in any nesting of lists, tuples and dicts."""


class VerificationError(RuntimeError):
    """Two models that should compute the same do not; the message names the worst layer."""


IN_MODEL, IN_STEP, ALONE = 'in the model', 'in a step', 'alone, on random input'
"""How a layer was verified: on the input it has in the compared forward pass, or in another one,
or on random input of its own."""


@dataclass(frozen=True)
class Verification:
    """Largest errors, each relative to the largest magnitude of the output it is found in.

    Attributes:
        layers: of every unit against the layer it became.
        output: of the models' outputs.
        how: by layer, on which input: ``IN_MODEL``, ``IN_STEP`` or ``ALONE``.
    """

    layers: dict[str, float]
    output: float
    how: dict[str, str]

    @property
    def worst_layer(self) -> str:
        """Name of the layer with the largest error."""
        return max(self.layers, key=self.layers.get)

    @property
    def max_error(self) -> float:
        """The largest of all errors."""
        return max(self.output, *self.layers.values())


TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest relative error that rounding explains, by the dtype of the model."""


@torch.no_grad()
def verify(
    expanded: nn.Module,
    compact: nn.Module,
    forward: Forward,
    tolerance: float | None = None,
    steps: Sequence[Forward] = (),
) -> Verification:
    """Compare an expanded model, run as the paper's chain, with its contraction.

    The chain shares no code with the product, so the comparison cannot agree with itself. Layers
    that ``forward`` does not reach are compared in ``steps``, and what these do not reach either,
    on random input. There the layers alone are compared, not what the model makes of them: a
    selection by score may flip by rounding.

    Args:
        expanded: a model with units. It is run in eval mode, and left as it was.
        compact: the contracted model, run in eval mode and left as it was.
        forward: runs either model on the same input.
        tolerance: largest relative error allowed; None: by dtype (``TOLERANCES``).
        steps: run the expanded model on other paths; one that raises is as one that reaches
            nothing.

    Returns:
        The errors by layer and end to end.

    Raises:
        VerificationError: if an error is larger than the tolerance or not finite, or if the
            outputs differ in structure.
    """
    units = named_units(expanded)
    if not units:
        raise VerificationError('the model holds no expanded layer')
    if tolerance is None:
        tolerance = TOLERANCES[next(iter(units.values())).like.dtype]
    layers: dict[str, float] = {}
    how: dict[str, str] = {}

    def compare(name: str) -> Callable:
        def hook(unit: Unit, args: tuple, kwargs: dict, output: Tensor) -> None:
            error = _error(output, compact.get_submodule(name)(*args, **kwargs))
            layers[name] = max(error, layers.get(name, 0.0))

        return hook

    with ExitStack() as stack:
        for context in (
            _eval_mode(expanded),
            _eval_mode(compact),
            _layerwise(units.values()),
            _full_precision(),
        ):
            stack.enter_context(context)
        handles = [
            unit.register_forward_hook(compare(name), with_kwargs=True)
            for name, unit in units.items()
        ]
        try:
            reference = forward(expanded)
            how.update(dict.fromkeys(layers, IN_MODEL))
            for step in steps:
                if len(layers) < len(units):
                    with suppress(Exception):
                        step(expanded)
            how.update(dict.fromkeys(layers.keys() - how.keys(), IN_STEP))
            for name, unit in units.items():
                if name not in layers:
                    unit(_random_input(unit))
                    how[name] = ALONE
        finally:
            for handle in handles:
                handle.remove()
        output = forward(compact)
    errors = _errors(reference, output)
    result = Verification({name: layers[name] for name in units}, max(errors, default=0.0), how)
    if not result.max_error <= tolerance:
        worst = result.worst_layer
        raise VerificationError(
            f'contraction changes the model: relative error {result.output:.3g} end to end, '
            f'{layers[worst]:.3g} in the worst layer {worst}, allowed {tolerance:.3g}'
        )
    return result


def _random_input(unit: Unit) -> Tensor:
    like = unit.like
    if isinstance(unit, ExpandedLinear):
        shape = (4, unit.in_features)
    else:
        # Larger than the dilated kernel, and of uneven sides.
        sides = [
            d * (k - 1) + 8 + i
            for i, (d, k) in enumerate(zip(unit.dilation, unit.kernel_size, strict=True))
        ]
        shape = (2, unit.in_channels, *sides)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _full_precision() -> Iterator[None]:
    # TF32 rounds inputs to 10 bits: it would hide an error of that size.
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept


@contextmanager
def _layerwise(units: Iterable[Unit]) -> Iterator[None]:
    kept = [(unit, vars(unit).get('forward')) for unit in units]
    for unit, _ in kept:
        unit.forward = unit.forward_layerwise
    try:
        yield
    finally:
        for unit, forward in kept:
            if forward is None:
                del unit.forward
            else:
                unit.forward = forward


def _errors(reference: Any, output: Any) -> list[float]:
    if isinstance(reference, Tensor):
        if not isinstance(output, Tensor) or output.shape != reference.shape:
            raise VerificationError(
                f'outputs differ in shape: {tuple(reference.shape)} expanded, '
                f'{tuple(getattr(output, "shape", ()))} compact'
            )
        return [_error(reference, output)]
    if isinstance(reference, dict):
        return [error for key in reference for error in _errors(reference[key], output[key])]
    if isinstance(reference, (list, tuple)):
        pairs = zip(reference, output, strict=True)
        return [error for pair in pairs for error in _errors(*pair)]
    return []


def _error(reference: Tensor, output: Tensor) -> float:
    if not reference.is_floating_point() or reference.numel() == 0:
        return 0.0
    difference = (reference.double() - output.double()).abs().max()
    scale = reference.double().abs().max()
    # All zeros leave nothing to be relative to.
    error = (difference / scale).item() if scale > 0 else difference.item()
    return error if math.isfinite(error) else math.inf
