"""A float32 graph as an int8 one, by images that it is calibrated with."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from onnx import ModelProto


def quantise(network: 'ModelProto', images: list[Tensor]) -> 'ModelProto':
    """Quantise convolutions and matrix products: weights by channel, activations by range.

    Args:
        network: without decoding, which stays float32.
        images: batches of what it takes.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = network.graph.input[0].name
    with TemporaryDirectory() as folder:
        prepared, quantised = Path(folder) / 'prepared.onnx', Path(folder) / 'int8.onnx'
        # Shapes of a network with open sizes are no business of quantisation.
        quant_pre_process(network, str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(quantised),
            _Reader(name, images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=['Conv', 'MatMul', 'Gemm'],
            per_channel=True,
            # Of 8 bits, 7: CPUs without VNNI add products up in 16 bits.
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(quantised)


class _Reader:
    """Images as ONNX Runtime's calibration wants them: one dictionary after another, then None."""

    def __init__(self, name: str, images: list[Tensor]):
        self._batches: Iterator[dict[str, np.ndarray]] = ({name: i.numpy()} for i in images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)
