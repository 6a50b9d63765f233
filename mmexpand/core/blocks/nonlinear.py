"""A chain with ReLU between its factors: what an ExpandNet may be started from (Sec. 5.3).

Keys and shapes are those of the linear chain, which a checkpoint of this one starts.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..algebra import Affine
from ..expression import Chain
from ..probe import Probe
from ..site import Site

NO_KERNEL = "there is ReLU between its factors (nonlinear='relu'), and no single layer is the same"


class NonlinearChain(Chain):
    """Factors that are no product: it is applied one after another, in any mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply one factor after another, ReLU before all but the first."""
        for index, node in enumerate(self):
            x = node(x.relu() if index else x)
        return x

    def fold(self, dtype: torch.dtype, probe: Probe | None = None) -> Affine:
        """Refused: there is no kernel.

        Raises:
            ValueError: always.
        """
        raise ValueError(NO_KERNEL)

    def kernel_refusal(self) -> str:
        """Why no factors stand for a kernel."""
        return NO_KERNEL


def with_relu(chain: Callable[[Site], Chain]) -> Callable[[Site], nn.Module]:
    """A block that is this chain with ReLU between its factors."""

    def block(site: Site) -> nn.Module:
        """W3 relu(W2 relu(W1 x))."""
        linear = chain(site)
        return NonlinearChain(list(linear), linear.groups)

    return block
