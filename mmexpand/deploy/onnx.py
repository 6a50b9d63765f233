"""The compact network as an ONNX file, compared with PyTorch before anyone can use it."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..mm.models import tensor_outputs
from ..surgery import is_expanded

OPSET = 17
TOLERANCE = 1e-4
"""Largest difference that rounding in float32 explains, relative to the largest output."""


@dataclass(frozen=True)
class OnnxReport:
    """What was exported, and how far it is from PyTorch.

    Attributes:
        path: the file.
        input_shape: of the image, with the batch size it was traced with.
        output_shapes: of the raw outputs for it, by the names they have in the file.
        max_error: largest difference relative to the largest magnitude of the output it is in,
            over batches of one and of two images.
    """

    path: Path
    input_shape: tuple[int, ...]
    output_shapes: dict[str, tuple[int, ...]]
    max_error: float


class RawOutputs(nn.Module):
    """An OpenMMLab model as a function from images to a flat list of tensors.

    Args:
        model: a detector (its heads' raw outputs), a segmentor (its logits) or a classifier.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """Run the model on preprocessed images, shape (N, C, H, W)."""
        return list(_flatten(tensor_outputs(self.model, dict(inputs=inputs))))


def _flatten(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
        return
    for item in outputs.values() if isinstance(outputs, dict) else outputs:
        yield from _flatten(item)


@torch.no_grad()
def export_onnx(
    model: nn.Module, inputs: Tensor, out: str | os.PathLike, tolerance: float = TOLERANCE
) -> OnnxReport:
    """Write the compact network as ONNX, once ONNX Runtime computes what PyTorch does.

    The batch size is dynamic, height and width are those of ``inputs``.

    Args:
        model: a compact model; it is run in eval mode and left as it was.
        inputs: a real image, preprocessed, shape (1, C, H, W).
        out: the file; it is replaced once the comparison has passed.
        tolerance: largest relative error allowed.

    Raises:
        ImportError: if onnx or onnxruntime is missing.
        ValueError: if the model is expanded.
        RuntimeError: if the outputs differ by more than the tolerance; nothing is written then.
    """
    _check_installed()
    if is_expanded(model):
        raise ValueError('the model is expanded; contract it first: mmexpand.contract(model)')
    out = Path(out)
    modes = {module: module.training for module in model.modules()}
    network = RawOutputs(model).eval()
    temporary = out.with_name(f'.{os.getpid()}.{out.name}')
    try:
        outputs = network(inputs)
        names = ['output'] if len(outputs) == 1 else [f'output_{i}' for i in range(len(outputs))]
        _export(network, inputs, temporary, names)
        # Two different images, so that a batch size frozen into the graph shows.
        batches = [inputs, torch.cat([inputs, inputs.flip(-1)])]
        error = max(_compare(network, batch, temporary) for batch in batches)
        if not error <= tolerance:
            raise RuntimeError(
                f'ONNX Runtime and PyTorch differ by {error:.3g} of the largest output, allowed '
                f'{tolerance:.3g}; {out} was not written'
            )
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
        for module, mode in modes.items():
            module.training = mode
    shapes = {name: tuple(o.shape) for name, o in zip(names, outputs, strict=True)}
    return OnnxReport(out, tuple(inputs.shape), shapes, error)


def _check_installed() -> None:
    missing = [name for name in ('onnx', 'onnxruntime') if find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not found: pip install 'mmexpand[deploy]'")


def _export(network: nn.Module, inputs: Tensor, path: Path, names: list[str]) -> None:
    with warnings.catch_warnings():
        # Shapes of the networks are traced as numbers, on purpose: H and W are fixed.
        warnings.filterwarnings('ignore', category=torch.jit.TracerWarning)
        warnings.filterwarnings('ignore', category=DeprecationWarning)
        # The TorchScript exporter: with torch 2.9 the dynamo exporter fails on both of our
        # networks, in onnxscript's version converter.
        torch.onnx.export(
            network,
            (inputs,),
            str(path),
            input_names=['input'],
            output_names=names,
            dynamic_axes={name: {0: 'batch'} for name in ['input', *names]},
            opset_version=OPSET,
            dynamo=False,
        )


def _compare(network: nn.Module, inputs: Tensor, path: Path) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    found = session.run(None, {'input': inputs.numpy()})
    return max(_error(e.numpy(), f) for e, f in zip(network(inputs), found, strict=True))


def _error(expected: np.ndarray, found: np.ndarray) -> float:
    if expected.shape != found.shape:
        return float('inf')
    scale = np.abs(expected).max()
    error = np.abs(expected.astype(np.float64) - found).max() / (scale if scale > 0 else 1)
    return float(error) if np.isfinite(error) else float('inf')
