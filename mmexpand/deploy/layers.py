"""Layers of an ONNX graph by the names that they have in the model."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.compat import ConvNd
from ..core.names import near_matches
from ..errors import ExportError
from ..surgery.plan import matches

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

QUANTISED = ('Conv', 'MatMul', 'Gemm')
"""Operators that become int8: exported convolutions, linear layers and attention."""
WEIGHTED = (ConvNd, nn.Linear, nn.MultiheadAttention)


def weighted_layers(model: nn.Module) -> list[str]:
    """Return the names of a compact model's layers with weights."""
    return [name for name, module in model.named_modules() if isinstance(module, WEIGHTED)]


def chosen_layers(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that patterns match.

    Args:
        names: names of layers.
        patterns: names of layers or of modules around them, globs, or ``re:`` expressions.

    Raises:
        ExportError: if a pattern matches no layer; the message gives near matches.
    """
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ExportError(
                f'{pattern!r} matches no convolution or linear layer that runs in int8; '
                f'{near_matches(pattern, names, "layers are:")}'
            )
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


@torch.no_grad()
def run_modules(network: nn.Module, images: Tensor) -> list[str]:
    """Return the names of the modules inside ``network.model`` that run for these images."""
    found: dict[str, None] = {}
    names: dict[nn.Module, list[str]] = {}
    for name, module in network.model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)

    def note(module: nn.Module, _: object) -> None:
        found.update(dict.fromkeys(names[module]))

    hooks = [module.register_forward_pre_hook(note) for module in names]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found)


def layer_nodes(graph: 'GraphProto', modules: Sequence[str]) -> dict[str, list[str]]:
    """Return the nodes that become int8 by layer, in the graph's order.

    A layer that runs on several levels has several nodes. Nodes have the names of the calls that
    lead to them; mmdet and mmseg call some heads without a scope, so their names are completed.

    Args:
        graph: a graph of TorchScript's exporter.
        modules: names of the modules that ran.
    """
    names = [node.name for node in graph.node if node.op_type in QUANTISED]
    # A layer with its whole path is not that of a head without a scope.
    whole = {path for name in names for path in _paths(name)} & set(modules)
    others = [module for module in modules if module not in whole]
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(_layer_of(name, modules, others), []).append(name)
    return layers


def head_layers(graph: 'GraphProto', layers: dict[str, list[str]]) -> list[str]:
    """Return the layers with no other layer between them and an output."""
    producers = {name: node for node in graph.node for name in node.output}
    waiting, seen, last = [output.name for output in graph.output], set(), set()
    while waiting:
        node = producers.get(waiting.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type in QUANTISED:
            last.add(node.name)
        else:
            waiting += node.input
    return [name for name, nodes in layers.items() if last.intersection(nodes)]


def node_of(graph: 'GraphProto', name: str) -> 'NodeProto':
    """Return the node of this name."""
    return next(node for node in graph.node if node.name == name)


def weight_of(graph: 'GraphProto', node_name: str) -> Tensor | None:
    """Return the weight of a node, output channels first; None for a product of activations."""
    from onnx.numpy_helper import to_array

    node = node_of(graph, node_name)
    found = [tensor for tensor in graph.initializer if tensor.name == node.input[1]]
    if not found:
        return None
    weight = torch.tensor(to_array(found[0]))
    transposed = any(a.name == 'transB' and a.i for a in node.attribute)
    if node.op_type == 'Conv' or transposed:
        return weight
    return weight.movedim(-1, 0)


def _paths(node_name: str) -> Iterator[str]:
    """Yield the modules whose call may have made a node, the innermost first."""
    segments = node_name.strip('/').split('/')[1:]  # Without the scope of the whole model.
    while len(segments) > 1:
        segments = segments[:-1]
        # The scope of a list precedes that of its item, which contains it.
        kept = [
            a
            for a, b in zip(segments, [*segments[1:], ''], strict=True)
            if not b.startswith(f'{a}.')
        ]
        yield '.'.join(kept)


def _layer_of(node_name: str, modules: Iterable[str], others: Iterable[str]) -> str:
    for path in _paths(node_name):
        if path in modules:
            return path
        # A head called without a scope is a child of the model. Calls have numbers: conv, conv_1.
        for call in (path, re.sub(r'_\d+(?=\.|$)', '', path)):
            if call in modules:
                return call
            found = [module for module in others if module.partition('.')[2] == call]
            if len(found) == 1:
                return found[0]
    return node_name.strip('/').replace('/', '.')
