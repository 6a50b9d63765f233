"""Quantisation of a float32 graph to int8, calibrated on images."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..surgery.fake_quantisation import TARGETS
from .layers import QUANTISED

ACTIVATIONS = ('Relu', 'Clip')
"""Operators that int8 replaces by the range of their output."""

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

METHODS = {'minmax': 'MinMax', 'percentile': 'Percentile', 'entropy': 'Entropy'}
"""ONNX Runtime's calibration methods by name."""


class Quantiser:
    """A float32 graph with the ranges of its activations.

    Args:
        network: the graph without decoding, which stays float32.
        images: batches of its input.
        method: a key of ``METHODS``.
        target: a key of ``TARGETS``.

    Attributes:
        model: the graph to quantise: ``network`` with folded constants.
        activations: activations that alone read the output of a layer's node, by the node's name.
    """

    def __init__(self, network: 'ModelProto', images: Sequence[Tensor], method: str, target: str):
        import onnx
        from onnxruntime.quantization import CalibrationMethod, create_calibrator
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self._rectified: set[str] | None = None
        self._reduce_range = TARGETS[target] < TARGETS['arm']
        name = network.graph.input[0].name
        with TemporaryDirectory() as folder:
            given, prepared = Path(folder) / 'given.onnx', Path(folder) / 'prepared.onnx'
            onnx.save(network, str(given))
            # From a file: ONNX Runtime moves a model's weights from memory to a file and loses it.
            quant_pre_process(str(given), str(prepared), skip_symbolic_shape=True)
            self.model = onnx.load(prepared)
            self.activations = _activations(self.model.graph)
            calibrator = create_calibrator(
                prepared,
                (*QUANTISED, *ACTIVATIONS),
                augmented_model_path=str(Path(folder) / 'augmented.onnx'),
                calibrate_method=CalibrationMethod[METHODS[method]],
                # Activations are unsigned: behind a ReLU, half of a symmetric range is empty.
                extra_options=dict(symmetric=False),
            )
            with redirect_stdout(StringIO()):  # ONNX Runtime prints its progress.
                for batch in images:  # One by one: batches that are given at once stay in memory.
                    calibrator.collect_data(_Reader(name, batch))
                self._tensors = calibrator.compute_data()

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of activations, by their names in the graph."""
        return {
            key: tuple(np.ravel(value.range_value).astype(float).tolist())
            for key, value in self._tensors.items()
        }

    def set_ranges(self, ranges: Mapping[str, Sequence[float]], rectified: set[str]) -> None:
        """Replace ranges that the images gave by trained ones.

        Args:
            ranges: lowest and highest value, by name.
            rectified: nodes of layers whose range is that behind an activation.
        """
        from onnxruntime.quantization.calibrate import TensorData

        self._rectified = rectified
        for name, bounds in ranges.items():
            low, high = np.array(bounds, np.float32)
            self._tensors[name] = TensorData(lowest=np.array(low), highest=np.array(high))

    def quantised(self, nodes: Sequence[str], per_channel: bool) -> 'ModelProto':
        """Return a copy of the graph with these nodes in int8.

        Args:
            nodes: names of convolutions and matrix products.
            per_channel: whether weights have a scale for each output channel, or one for all.
        """
        from onnxruntime.quantization import QDQQuantizer, QuantType

        if not nodes:  # The quantizer takes an empty list for all nodes.
            return copy.deepcopy(self.model)
        rectified = self.activations if self._rectified is None else self._rectified
        names = [self.activations[name].name for name in nodes if name in rectified]
        quantizer = QDQQuantizer(
            copy.deepcopy(self.model),
            per_channel=per_channel,
            reduce_range=self._reduce_range,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=copy.deepcopy(self._tensors),
            nodes_to_quantize=[*nodes, *names],
            nodes_to_exclude=[],
            op_types_to_quantize=(*QUANTISED, *ACTIVATIONS),
            extra_options={},
        )
        quantizer.quantize_model()
        if self._rectified is not None:
            _leave_float(quantizer.model.model.graph, set(nodes))
        quantizer.model.topological_sort()
        return quantizer.model.model


def _activations(graph: 'GraphProto') -> dict[str, 'NodeProto']:
    layers = {node.output[0]: node.name for node in graph.node if node.op_type in QUANTISED}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(output.name for output in graph.output)
    return {
        layers[node.input[0]]: node
        for node in graph.node
        if node.op_type in ACTIVATIONS
        and node.input[0] in layers
        and readers[node.input[0]] == 1
        and _holds_zero(graph, node)
    }


def _holds_zero(graph: 'GraphProto', node: 'NodeProto') -> bool:
    """Return whether a Clip leaves zero unchanged, which every int8 range contains."""
    from onnx.numpy_helper import to_array

    given = [(name, sign) for name, sign in zip(node.input[1:3], (1, -1), strict=False) if name]
    names = {name for name, _ in given}
    bounds = {t.name: to_array(t) for t in graph.initializer if t.name in names}
    return all(name in bounds and sign * bounds[name] <= 0 for name, sign in given)


def _leave_float(graph: 'GraphProto', nodes: set[str]) -> None:
    """Give inputs of quantised nodes to all other nodes in float, as QuantHook trains them.

    ONNX Runtime's tool rounds a tensor for all its readers, such as the sum behind a block.
    """
    producers = {name: node for node in graph.node for name in node.output}
    rounded = {}
    for node in graph.node:
        source = producers.get(node.input[0]) if node.op_type == 'DequantizeLinear' else None
        if source is not None and source.op_type == 'QuantizeLinear':
            before = producers.get(source.input[0])
            if before is None or before.name not in nodes:
                rounded[node.output[0]] = source.input[0]
    for node in graph.node:
        if node.name not in nodes:
            for index, name in enumerate(node.input):
                node.input[index] = rounded.get(name, name)


class _Reader:
    """One batch as ONNX Runtime's calibration reads it: a dictionary, then None."""

    def __init__(self, name: str, batch: Tensor):
        self._batches: Iterator[dict[str, np.ndarray]] = iter([{name: batch.numpy()}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)
