"""The product of a chain as two CUDA graphs: one launch for the fold, one for its gradient."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .algebra import Affine
from .product import ChainProduct, Saved

Result = TypeVar('Result')
logger = logging.getLogger(__name__)

WARM_UP = 3
"""Runs before a capture: libraries allocate their workspaces in the first ones."""


class CapturedProduct:
    """A ``ChainProduct`` that replays what it has captured; of use while the factors stay in place.

    A replay writes to the buffers of the last one, so that everything it returns is a copy:
    autograd keeps a gradient that nobody else holds, and would add the next one to it.

    Args:
        product: of factors on a GPU.
    """

    def __init__(self, product: ChainProduct):
        self._fold, (self._affine, self._saved) = _capture(product.multiply)
        self._gradients = [None if v is None else torch.zeros_like(v) for v in self._affine]
        self._back, self._found = _capture(lambda: product.pull_back(self._saved, *self._gradients))

    def multiply(self) -> tuple[Affine, Saved]:
        """Return what ``ChainProduct.multiply`` does."""
        self._fold.replay()
        return tuple(None if v is None else v.clone() for v in self._affine), self._saved

    def pull_back(self, saved: Saved, kernel: Tensor, bias: Tensor | None) -> list[Tensor]:
        """Return what ``ChainProduct.pull_back`` does, for the last product."""
        for buffer, gradient in zip(self._gradients, (kernel, bias), strict=True):
            if buffer is not None:
                buffer.copy_(gradient)
        self._back.replay()
        return [gradient.clone() for gradient in self._found]


def captured(product: ChainProduct) -> ChainProduct | CapturedProduct:
    """Return the product captured; itself, with a warning, if that fails."""
    try:
        return CapturedProduct(product)
    except RuntimeError as error:
        logger.warning('A fold was not captured as a CUDA graph, and runs eagerly: %s', error)
        return product


def _capture(run: Callable[[], Result]) -> tuple['torch.cuda.CUDAGraph', Result]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Threads of NCCL and of data loaders use the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode='thread_local'):
        result = run()
    return graph, result
