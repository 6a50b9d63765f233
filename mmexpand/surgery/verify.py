"""Proof that two models compute the same: layer by layer and end to end, on real input."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .swap import Unit, named_units

Forward = Callable[[nn.Module], Any]
"""Runs a model on the input; returns tensors in any nesting of lists, tuples and dicts."""


class VerificationError(RuntimeError):
    """Two models that should compute the same do not; the message names the worst layer."""


@dataclass(frozen=True)
class Verification:
    """Largest errors, each relative to the largest magnitude of the output it is found in.

    Attributes:
        layers: of every unit against the layer it became, on the input it has in the model.
        output: of the models' outputs.
    """

    layers: dict[str, float]
    output: float

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
    expanded: nn.Module, compact: nn.Module, forward: Forward, tolerance: float | None = None
) -> Verification:
    """Compare an expanded model, run as the paper's chain, with its contraction.

    The chain shares no code with the product, so the comparison cannot agree with itself.

    Args:
        expanded: a model with units. It is run in eval mode, and left as it was.
        compact: the contracted model, run in eval mode and left as it was.
        forward: runs either model on the same input.
        tolerance: largest relative error allowed; None: by dtype (``TOLERANCES``).

    Returns:
        The errors by layer and end to end.

    Raises:
        VerificationError: if an error is larger than the tolerance or not finite, or if the
            outputs differ in structure.
    """
    units = named_units(expanded)
    if tolerance is None:
        dtype = next(iter(units.values())).like.dtype
        tolerance = TOLERANCES[dtype]
    layers: dict[str, float] = {}

    def compare(name: str) -> Callable:
        def hook(unit: Unit, args: tuple, output: Tensor) -> None:
            error = _error(output, compact.get_submodule(name)(*args))
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
        handles = [unit.register_forward_hook(compare(name)) for name, unit in units.items()]
        try:
            reference = forward(expanded)
        finally:
            for handle in handles:
                handle.remove()
        output = forward(compact)
    errors = _errors(reference, output)
    result = Verification(layers, max(errors, default=0.0))
    if not layers:
        raise VerificationError('no expanded layer was reached by this forward pass')
    if not result.max_error <= tolerance:
        worst = result.worst_layer
        raise VerificationError(
            f'contraction changes the model: relative error {result.output:.3g} end to end, '
            f'{layers[worst]:.3g} in the worst layer {worst}, allowed {tolerance:.3g}'
        )
    return result


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
    units = list(units)
    for unit in units:
        unit.forward = unit.forward_layerwise
    try:
        yield
    finally:
        for unit in units:
            del unit.forward


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
