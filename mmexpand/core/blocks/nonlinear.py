"""A chain with ReLU between its factors: what an ExpandNet may be started from (Sec. 5.3).

Keys and shapes are those of the linear chain, which a checkpoint of this one starts.
"""

import torch
from torch import Tensor

from ...errors import UserValueError
from ..algebra import Affine
from ..batch_sample import BatchSample
from ..expression import Chain

NO_KERNEL = "there is ReLU between its factors (nonlinear='relu'), and no single layer is the same"


class NonlinearChain(Chain):
    """Factors that are no product: it is applied one after another, in any mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply one factor after another, ReLU before all but the first."""
        for index, node in enumerate(self):
            x = node(x.relu() if index else x)
        return x

    def fold(self, dtype: torch.dtype, sample: BatchSample | None = None) -> Affine:
        """Refused: there is no kernel.

        Raises:
            ValueError: always.
        """
        raise UserValueError(NO_KERNEL)

    def kernel_refusal(self) -> str:
        """Why no factors stand for a kernel."""
        return NO_KERNEL
