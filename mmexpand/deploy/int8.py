"""Choice of the layers that become int8, and the error of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from ..core.names import check_choice
from ..errors import ExportError, UserValueError
from ..mm.datasets import evenly_spaced
from ..surgery.fake_quantisation import RECTIFIED, TARGETS
from ..surgery.outliers import FAR, outlying_channel, outlying_weight
from .layers import chosen_layers, head_layers, layer_nodes, node_of, weight_of
from .quantisation import METHODS, Quantiser
from .runtimes import onnxruntime_run

if TYPE_CHECKING:
    from onnx import ModelProto

COMPARED = 4
"""Number of calibration images for the errors of layers: each layer takes as many runs."""


@dataclass(frozen=True)
class Int8:
    """Options of an int8 export.

    Attributes:
        images: preprocessed images to calibrate with, shape (1, C, H, W) each.
        keep: layers that stay float32: names, modules around them, globs, ``re:`` expressions.
        target: processor of the file, a key of ``TARGETS``.
        method: method that finds the ranges of activations, a key of ``METHODS``.
        ranges: lowest and highest value of the input and the output of layers, by name, as
            QuantHook has trained them for this target; other layers stay float32. None: by
            calibration.
        accepts: whether a file is good enough. If given, more layers stay float32 until one is:
            head layers first, then those with the largest errors.

    Raises:
        ValueError: if no image is given, or the target or the method is unknown.
    """

    images: Sequence[Tensor]
    keep: Sequence[str] = ()
    target: str = 'x86'
    method: str = 'minmax'
    ranges: Mapping[str, Mapping[str, Sequence[float]]] | None = None
    accepts: Callable[[Path], bool] | None = None

    def __post_init__(self):
        if not self.images:
            raise UserValueError('int8 requires calibration images; give at least one')
        check_choice('int8 target', self.target, TARGETS)
        check_choice('int8 method', self.method, METHODS)


@dataclass(frozen=True)
class LayerError:
    """The error that a layer causes when it alone is int8.

    Attributes:
        name: the name of the layer in the model.
        error: the error of the raw outputs; see ``Int8Report.error``.
        reason: figures of its weights or inputs that explain the error.
    """

    name: str
    error: float
    reason: str


@dataclass(frozen=True)
class Int8Report:
    """An int8 network compared with the float32 one.

    Attributes:
        error: root mean square of the raw outputs' differences, relative to that of the float32
            outputs' differences from their mean over the images. At 1 the outputs do not depend on
            the image.
        per_channel: whether weights have a scale for each output channel, or one for all.
        kept: layers that stay float32.
        layers: all layers, the largest error first.
    """

    error: float
    per_channel: bool
    kept: tuple[str, ...]
    layers: tuple[LayerError, ...]


class Int8Search:
    """The choice among the int8 graphs of a network.

    Args:
        network: the float32 graph, without decoding.
        model: the exported model.
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
        self._trained = int8.ranges is not None
        if self._trained:
            self._keep_untrained(int8.ranges)
            self._quantiser.set_ranges(*self._trained_ranges(int8.ranges))
        self._searches = int8.accepts is not None
        # The first images of a data set that is sorted by class may be alike.
        self._images = [images[i] for i in evenly_spaced(len(images), COMPARED)]
        self._expected = self._outputs(self._quantiser.model)

    def choose(self, accepts: Callable[['ModelProto'], bool]) -> 'tuple[ModelProto, Int8Report]':
        """Return the graph with the fewest layers in float32.

        Args:
            accepts: returns whether a graph is good enough; used if ``int8.accepts`` is given.

        Raises:
            ExportError: if no layer is left to quantise, no graph is good enough, or the kernels
                of this ONNX Runtime are wrong.
        """
        per_channel = self._trained or self._is_better_per_channel()
        ranking = self._ranking(per_channel)
        kept = self._kept
        if len(kept) == len(self._layers):
            raise ExportError('no layer is left to quantise; use the float32 file')
        if self._searches and not accepts(self._without(kept, per_channel)):
            order = self._order([layer.name for layer in ranking])
            count = smallest(
                lambda count: accepts(self._without([*kept, *order[:count]], per_channel)),
                len(order) - 1,
            )
            if count is None:
                raise ExportError(
                    'no int8 file is good enough, even with all layers but one in float32; use '
                    'the float32 file, or allow a larger drop (--int8-drop)'
                )
            kept = [*kept, *order[:count]]
        graph = self._without(kept, per_channel)
        self._check_kernels(graph)
        return graph, Int8Report(self._error(graph), per_channel, tuple(kept), ranking)

    def _is_better_per_channel(self) -> bool:
        errors = {way: self._error(self._without(self._kept, way)) for way in (True, False)}
        return errors[True] <= errors[False]

    def _keep_untrained(self, ranges: Mapping[str, Mapping]) -> None:
        """Keep layers in float32 whose ranges QuantHook did not train, or do not fit the graph.

        A range behind a ReLU fits only if the graph has an activation behind the layer.
        """
        behind = self._quantiser.activations
        self._kept += [
            name
            for name, nodes in self._layers.items()
            if name not in self._kept
            and (
                name not in ranges
                or (RECTIFIED in ranges[name] and any(n not in behind for n in nodes))
            )
        ]

    def _trained_ranges(
        self, ranges: Mapping[str, Mapping[str, Sequence[float]]]
    ) -> tuple[dict[str, Sequence[float]], set[str]]:
        """Return ranges by name in the graph, and the nodes whose range is that of an activation.

        If several layers read a tensor, the first layer to run sets its range, as in training.
        """
        layers = {node: name for name, nodes in self._layers.items() for node in nodes}
        found: dict[str, Sequence[float]] = {}
        rectified = set()
        for node in self._graph.node:
            layer = layers.get(node.name)
            if layer in ranges and layer not in self._kept:
                output, key = node.output[0], 'output'
                if RECTIFIED in ranges[layer]:
                    rectified.add(node.name)
                    output, key = self._quantiser.activations[node.name].output[0], RECTIFIED
                found.setdefault(node.input[0], ranges[layer]['input'])
                found.setdefault(output, ranges[layer][key])
        return found, rectified

    def _order(self, by_error: list[str]) -> list[str]:
        """Return the layers in the order in which they are kept: heads, then by their errors."""
        heads = head_layers(self._graph, self._layers)
        order = [*heads, *(name for name in by_error if name not in heads)]
        return [name for name in order if name not in self._kept]

    def _ranking(self, per_channel: bool) -> tuple[LayerError, ...]:
        found = []
        for name, nodes in self._layers.items():
            error = self._error(self._quantiser.quantised(nodes, per_channel))
            found.append(LayerError(name, error, self._reason(name, nodes[0])))
        return tuple(sorted(found, key=lambda layer: -layer.error))

    def _without(self, kept: Sequence[str], per_channel: bool) -> 'ModelProto':
        nodes = [n for name, nodes in self._layers.items() if name not in kept for n in nodes]
        return self._quantiser.quantised(nodes, per_channel)

    def _check_kernels(self, graph: 'ModelProto') -> None:
        """Compare int8 kernels with float kernels, since kernels of some processors were wrong.

        ONNX Runtime 1.23 on Intel's AMX: https://github.com/microsoft/onnxruntime/issues/26324.
        """
        import onnxruntime

        plain = self._outputs(graph, optimise=False)
        by_kernels = by_head(self._outputs(graph), plain)
        by_rounding = by_head(plain, self._expected)
        for kernels, rounding in zip(by_kernels, by_rounding, strict=True):
            if kernels > rounding:
                raise ExportError(
                    f'the int8 kernels of ONNX Runtime {onnxruntime.__version__} are wrong on this '
                    f'processor: their error is {kernels:.3g}, and the rounding to int8 causes '
                    f'{rounding:.3g}; install another version (1.26 is correct with AMX)'
                )

    def _outputs(self, graph: 'ModelProto', optimise: bool = True) -> list[np.ndarray]:
        import onnx

        with TemporaryDirectory() as folder:
            path = Path(folder) / 'graph.onnx'
            onnx.save(graph, path)
            run = onnxruntime_run(path, optimise=optimise)
            by_image = [run(image.numpy()) for image in self._images]
        return [np.stack(values).astype(np.float64) for values in zip(*by_image, strict=True)]

    def _error(self, graph: 'ModelProto') -> float:
        expected = self._expected
        centres = [output.mean(0) if len(output) > 1 else 0 for output in expected]
        errors = zip(
            by_head(self._outputs(graph), expected),
            by_head(expected, centres),
            by_head(expected, [0] * len(expected)),
            strict=True,
        )
        # Outputs that are equal for all images have no spread: any error would be infinite.
        return max(error / max(spread, 1e-3 * size, 1e-12) for error, spread, size in errors)

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


def smallest(accepted: Callable[[int], bool], largest: int) -> int | None:
    """Return the smallest accepted number from 1 to ``largest``; None if none is accepted.

    Args:
        accepted: returns whether a number is accepted; larger numbers are then accepted too.
        largest: the last number.
    """
    low, high = 0, min(1, largest)
    while high and not accepted(high):
        low, high = high, min(2 * high, largest) if high < largest else 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if accepted(middle) else (middle, high)
    return high or None


def _norm_words(merged: Tensor, own: Tensor) -> list[str]:
    """Return words on a norm that scales a channel of the merged kernel far above the others."""
    scales = merged.flatten(1).norm(dim=1) / own.flatten(1).norm(dim=1).clamp(min=1e-12)
    largest, channel = scales.max(0)
    if largest < FAR * scales.median():
        return []
    return [
        f'its norm scales channel {channel} by {largest:.3g}, the median by {scales.median():.3g}'
    ]


def by_head(outputs: Sequence[np.ndarray], others: Sequence[np.ndarray | int]) -> list[float]:
    """Return the root mean square of differences, for outputs of as many channels together.

    These are the levels of one head of a detector. A level without an object hardly depends on the
    image.
    """
    squares: dict[tuple, list[np.ndarray]] = {}
    for output, other in zip(outputs, others, strict=True):
        squares.setdefault(output.shape[2:3], []).append(np.square(output - other).ravel())
    return [float(np.sqrt(np.concatenate(values).mean())) for values in squares.values()]
