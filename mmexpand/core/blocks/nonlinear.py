"""A chain with ReLU between its factors, from which an ExpandNet can start (Sec. 5.3).

Keys and shapes equal the linear chain's, so that the linear chain can load its checkpoint.
"""

import torch
from torch import Tensor

from ...errors import UserValueError
from ..algebra import Affine
from ..batch_sample import BatchSample
from ..expression import Chain

NO_KERNEL = "it has ReLU between its factors (nonlinear='relu'), and no single layer is equal to it"


class NonlinearChain(Chain):
    """Factors with ReLU between them. They have no product, and are applied one after another."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply one factor after another, ReLU before all but the first."""
        for index, node in enumerate(self):
            x = node(x.relu() if index else x)
        return x

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """Raise ValueError: a nonlinear chain has no kernel."""
        raise UserValueError(NO_KERNEL)

    def kernel_refusal(self) -> str:
        """Return the reason why the chain has no kernel."""
        return NO_KERNEL
