"""Which layers of a network become int8, and what each of them costs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from ..errors import UserValueError
from ..surgery.outliers import FAR, outlying_channel, outlying_weight
from .errors import ExportError
from .layers import chosen_layers, head_layers, layer_nodes, node_of, weight_of
from .quantisation import METHODS, TARGETS, Quantiser
from .runtimes import onnxruntime_run

if TYPE_CHECKING:
    from onnx import ModelProto

COMPARED = 4
"""Calibration images that errors are measured on: each layer takes as many runs."""


@dataclass(frozen=True)
class Int8:
    """Options of an int8 export.

    Attributes:
        images: preprocessed images to calibrate with, shape (1, C, H, W) each.
        keep: layers that stay float32: names, modules around them, globs, ``re:`` expressions.
        target: processor that will run the file, a key of ``TARGETS``.
        method: how ranges of activations are found, a key of ``METHODS``.
        accepts: whether a file is good enough. If given, more layers stay float32 until one is:
            head layers first, then those with the largest errors.

    Raises:
        ValueError: if there is no image, or the target or the method is unknown.
    """

    images: Sequence[Tensor]
    keep: Sequence[str] = ()
    target: str = 'x86'
    method: str = 'minmax'
    accepts: Callable[[Path], bool] | None = None

    def __post_init__(self):
        if not self.images:
            raise UserValueError('int8 without images: it is calibrated on at least one')
        for name, value, known in (
            ('target', self.target, TARGETS),
            ('method', self.method, METHODS),
        ):
            if value not in known:
                raise UserValueError(f'int8 {name} {value!r} is unknown: choose {", ".join(known)}')


@dataclass(frozen=True)
class LayerError:
    """The error that a layer causes when it alone is int8.

    Attributes:
        name: of the layer in the model.
        error: of the raw outputs; see ``Int8Report.error``.
        reason: the figures of its weights or inputs that explain it.
    """

    name: str
    error: float
    reason: str


@dataclass(frozen=True)
class Int8Report:
    """An int8 network compared with the float32 one.

    Attributes:
        error: of the raw outputs: root mean square of the differences, relative to that of the
            float32 outputs' differences from their mean over the images. At 1 they tell nothing
            of an image.
        per_channel: whether weights have a scale for each output channel, or one for all.
        kept: layers that stay float32.
        layers: all layers, the largest error first.
    """

    error: float
    per_channel: bool
    kept: tuple[str, ...]
    layers: tuple[LayerError, ...]


class Int8Search:
    """The int8 graphs of a network, in the order in which they are tried.

    Args:
        network: the float32 graph, without decoding.
        model: that it was made of.
        modules: names of the model's modules that run.
        images: batches of the graph's input.
        int8: the options.

    Raises:
        ExportError: if a pattern of ``int8.keep`` matches no layer.
    """

    def __init__(
        self,
        network: 'ModelProto',
        model: nn.Module,
        modules: Sequence[str],
        images: Sequence[Tensor],
        int8: Int8,
    ):
        self._model = model
        self._quantiser = Quantiser(network, images, int8.method, int8.target)
        self._graph = self._quantiser.model.graph
        self._layers = layer_nodes(self._graph, modules)
        self._kept = chosen_layers(list(self._layers), int8.keep)
        self._more = int8.accepts is not None
        self._images = images[:COMPARED]
        self._expected = self._outputs(self._quantiser.model)

    def candidates(self) -> 'Iterator[tuple[ModelProto, Int8Report]]':
        """One graph; with ``int8.accepts`` more, each with more layers in float32.

        Raises:
            ExportError: if no layer is left to quantise.
        """
        schemes = {way: self._error(self._without(self._kept, way)) for way in (True, False)}
        per_channel = schemes[True] <= schemes[False]
        ranking = self._ranking(per_channel)
        for kept in self._growing([layer.name for layer in ranking]):
            if len(kept) == len(self._layers):
                raise ExportError('no layer is left to quantise: use the float32 file')
            graph = self._without(kept, per_channel)
            yield graph, Int8Report(self._error(graph), per_channel, tuple(kept), ranking)
        raise ExportError(
            'no int8 file is good enough, even with all layers but one in float32: use the float32 '
            'file, or allow a larger drop (--int8-drop)'
        )

    def _growing(self, by_error: list[str]) -> Iterator[list[str]]:
        """Names of layers to keep; they are doubled, so that few files have to be evaluated."""
        kept = self._kept
        yield kept
        if not self._more:
            return
        heads = head_layers(self._graph, self._layers)
        order = [n for n in [*heads, *(n for n in by_error if n not in heads)] if n not in kept]
        count = len([name for name in heads if name not in kept]) or 1
        while count < len(order) - 1:
            yield [*kept, *order[:count]]
            count *= 2
        if len(order) > 1:
            yield [*kept, *order[:-1]]

    def _ranking(self, per_channel: bool) -> tuple[LayerError, ...]:
        found = []
        for name, nodes in self._layers.items():
            error = self._error(self._quantiser.quantised(nodes, per_channel))
            found.append(LayerError(name, error, self._reason(name, nodes[0])))
        return tuple(sorted(found, key=lambda layer: -layer.error))

    def _without(self, kept: Sequence[str], per_channel: bool) -> 'ModelProto':
        nodes = [n for name, nodes in self._layers.items() if name not in kept for n in nodes]
        return self._quantiser.quantised(nodes, per_channel)

    def _outputs(self, graph: 'ModelProto') -> list[np.ndarray]:
        import onnx

        with TemporaryDirectory() as folder:
            path = Path(folder) / 'graph.onnx'
            onnx.save(graph, path)
            run = onnxruntime_run(path)
            by_image = [run(image.numpy()) for image in self._images]
        return [np.stack(values).astype(np.float64) for values in zip(*by_image, strict=True)]

    def _error(self, graph: 'ModelProto') -> float:
        errors = []
        for found, expected in zip(self._outputs(graph), self._expected, strict=True):
            centre = expected.mean(0) if len(expected) > 1 else 0
            # What is the same for all images has no spread: the smallest error would be infinite.
            scale = max(_rms(expected - centre), 1e-3 * _rms(expected), 1e-12)
            errors.append(_rms(found - expected) / scale)
        return max(errors)

    def _reason(self, layer: str, node: str) -> str:
        weight = weight_of(self._graph, node)
        low, high = self._quantiser.ranges.get(node_of(self._graph, node).input[0], (0.0, 0.0))
        inputs = f'inputs from {low:.3g} to {high:.3g}'
        if weight is None:
            return inputs
        words = [words for f in (outlying_channel, outlying_weight) if (words := f(weight))]
        module = dict(self._model.named_modules(remove_duplicate=False)).get(layer)
        own = getattr(module, 'weight', None)
        if own is not None and own.shape == weight.shape:
            words += _norm_words(weight, own)
        return ', '.join(words or [inputs, f'weights up to {weight.abs().max():.3g}'])


def _norm_words(merged: Tensor, own: Tensor) -> list[str]:
    """Words on a norm that scales a channel far above the others, by the kernel it is merged in."""
    scales = merged.flatten(1).norm(dim=1) / own.flatten(1).norm(dim=1).clamp(min=1e-12)
    largest, channel = scales.max(0)
    if largest < FAR * scales.median():
        return []
    return [
        f'its norm scales channel {channel} by {largest:.3g}, the median by {scales.median():.3g}'
    ]


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))
