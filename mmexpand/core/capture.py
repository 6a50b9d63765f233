"""CUDA graphs of a chain's product: one launch for the fold, one for its gradient."""

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
"""Runs before a capture, because libraries allocate their workspaces in the first runs."""


class CapturedProduct:
    """A ``ChainProduct`` that replays CUDA graphs; valid while the factors stay in place.

    Each replay writes to the same buffers, so that kernels and gradients are returned as copies.
    Otherwise autograd would keep a buffer as ``.grad``, and the next replay would overwrite it.

    Args:
        product: the product of factors on a GPU.
    """

    def __init__(self, product: ChainProduct):
        self._fold, (self._affine, self._saved) = _capture(product.multiply)
        self._gradients = [None if v is None else torch.zeros_like(v) for v in self._affine]
        self._back, self._found = _capture(lambda: product.pull_back(self._saved, *self._gradients))

    def multiply(self) -> tuple[Affine, Saved]:
        """Return the result of ``ChainProduct.multiply``."""
        self._fold.replay()
        return tuple(None if v is None else v.clone() for v in self._affine), self._saved

    def pull_back(self, saved: Saved, kernel: Tensor, bias: Tensor | None) -> list[Tensor]:
        """Return the result of ``ChainProduct.pull_back`` for the last product."""
        for buffer, gradient in zip(self._gradients, (kernel, bias), strict=True):
            if buffer is not None:
                buffer.copy_(gradient)
        self._back.replay()
        return [gradient.clone() for gradient in self._found]


def captured(product: ChainProduct) -> ChainProduct | CapturedProduct:
    """Return the captured product; log a warning and return the given one if the capture fails."""
    try:
        return CapturedProduct(product)
    except RuntimeError as error:
        logger.warning('Capturing a fold as a CUDA graph failed; the fold runs eagerly: %s', error)
        return product


def _capture(run: Callable[[], Result]) -> tuple['torch.cuda.CUDAGraph', Result]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The default mode fails if threads of NCCL or of data loaders use the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode='thread_local'):
        result = run()
    return graph, result
