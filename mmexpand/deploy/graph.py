"""ONNX graphs: tracing a module, and joining the network with its decoding."""

import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch
from torch import Tensor, nn

from ..errors import ExportError
from .tracing import open_sizes

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

OPSET = 17
PREFIX = 'decode/'


def trace(
    module: nn.Module,
    inputs: Sequence[Tensor],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic: dict[str, dict[int, str]],
    first_as_call: bool = False,
) -> 'ModelProto':
    """Trace a module into an ONNX graph.

    Args:
        module: a module in eval mode.
        inputs: the inputs of the trace.
        input_names: names of the inputs.
        output_names: names of the outputs.
        dynamic: names of the dynamic axes, by names of inputs and outputs.
        first_as_call: trace it as a plain call first, since branches of mmdet's decoding for ONNX
            export are from its version 2 and fail. The types of the tensors are then lost.

    Raises:
        ExportError: if ONNX cannot express it.
    """
    import onnx

    name = type(getattr(module, 'model', getattr(module, 'head', module))).__name__
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        # The exporter prints the whole graph after a failure.
        mock.patch.object(torch._C, '_jit_onnx_log', lambda *_: None),
    ):
        warnings.simplefilter('ignore')  # Tracing warns of every constant shape.
        path = Path(folder) / 'network.onnx'
        try:
            with open_sizes():
                if first_as_call:
                    module = torch.jit.trace(module, tuple(inputs), check_trace=False)
                # TorchScript's exporter: torch 2.9's newer one cannot trace data-dependent shapes.
                torch.onnx.export(
                    module,
                    tuple(inputs),
                    str(path),
                    input_names=list(input_names),
                    output_names=list(output_names),
                    dynamic_axes=dynamic,
                    opset_version=OPSET,
                    dynamo=False,
                )
        except ExportError:
            raise
        except Exception as error:  # torch, mmcv and mmdet raise many types.
            raise ExportError(f'{name} cannot be exported to ONNX: {first_line(error)}') from error
        return onnx.load(path)


def attach(network: 'ModelProto', decoding: 'ModelProto', per_image: bool) -> None:
    """Put the decoding behind the network, in place.

    Args:
        network: graph from a batch of images to raw outputs.
        decoding: graph from ``size`` and the raw outputs to predictions.
        per_image: whether the decoding takes one image; it then runs in a loop over the batch.
    """
    import onnx
    from onnx.helper import make_node

    graph = network.graph
    decode = onnx.compose.add_prefix(decoding, PREFIX).graph
    size = make_node('Shape', [graph.input[0].name], [f'{PREFIX}size'], start=2, end=4)
    raw = [output.name for output in graph.output]
    targets = [f'{PREFIX}raw_{index}' for index in range(len(raw))]
    outputs = [output.name for output in decoding.graph.output]
    del graph.output[:]
    graph.node.append(size)
    if per_image:
        graph.node.extend(_loop(graph.input[0].name, decode, raw, targets, outputs))
    else:
        graph.node.extend(
            make_node('Identity', [a], [b]) for a, b in zip(raw, targets, strict=True)
        )
        graph.node.extend(decode.node)
        graph.initializer.extend(decode.initializer)
        graph.node.extend(make_node('Identity', [PREFIX + name], [name]) for name in outputs)
    graph.output.extend(_declared(value, per_image) for value in decoding.graph.output)
    onnx.checker.check_model(network)


def _loop(
    image: str, decode: 'GraphProto', raw: list[str], targets: list[str], outputs: list[str]
) -> 'list[NodeProto]':
    """Return a loop over the images of a batch, whose body decodes one image."""
    from onnx import TensorProto
    from onnx.helper import make_graph, make_node, make_tensor, make_tensor_value_info

    body = make_graph(
        [
            make_node('Reshape', ['index', 'one'], ['index_1d']),
            *(
                make_node('Gather', [a, 'index_1d'], [b], axis=0)
                for a, b in zip(raw, targets, strict=True)
            ),
            *decode.node,
            make_node('Identity', ['condition'], ['goes_on']),
        ],
        'decode_image',
        [
            make_tensor_value_info('index', TensorProto.INT64, []),
            make_tensor_value_info('condition', TensorProto.BOOL, []),
        ],
        [make_tensor_value_info('goes_on', TensorProto.BOOL, []), *decode.output],
        [make_tensor('one', TensorProto.INT64, [1], [1]), *decode.initializer],
    )
    always = make_tensor('always', TensorProto.BOOL, [], [True])
    return [
        make_node('Shape', [image], ['batch_1d'], start=0, end=1),
        make_node('Squeeze', ['batch_1d'], ['batch']),
        make_node('Constant', [], ['always'], value=always),
        make_node('Loop', ['batch', 'always'], outputs, body=body),
    ]


def _declared(value, per_image: bool):  # noqa: ANN001
    from onnx.helper import make_tensor_value_info

    kind = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    shape = ['batch', *shape] if per_image else shape
    return make_tensor_value_info(value.name, kind.elem_type, shape)


def open_axes(name: str, value: Tensor, axes: Sequence[int]) -> dict[int, str]:
    """Return the names of the axes that a tensor has."""
    return {a: f'{name}_{a}' if a else 'batch' for a in axes if a < value.dim()}


def first_line(error: Exception) -> str:
    """Return the message of a foreign error without the graph that it contains."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    words = (lines[0].strip() if lines else type(error).__name__).split(' [Caused by')[0]
    words = re.sub(r'Load model from \S+ failed: ?(Fatal error: )?', '', words)
    return words.split(' Status Message: ')[-1].split('. Please feel free')[0].rstrip('.')
