"""Cases of the training benchmark: a network, its input, and its variants."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.compat import parameters_of
from ..surgery import ExpandConfig, expand_

COMPACT = 'compact'
OURS = ('layerwise', 'folded', 'auto')

PEERS = {
    'OREPA': dict(method='orepa', forward='folded'),
    'DO-Conv': dict(method='do', forward='folded'),
    'RepVGG folded': dict(method='repvgg', forward='folded'),
    'DBB folded': dict(method='dbb', forward='folded'),
    'RepVGG': dict(method='repvgg', forward='layerwise'),
    'ACNet': dict(method='acnet', forward='layerwise'),
    'DBB': dict(method='dbb', forward='layerwise'),
}
"""Other blocks to time in the same layers: fields of ``ExpandConfig``."""


def run_model(model: nn.Module, images: Tensor) -> Any:
    """Run a plain model on images."""
    return model(images)


@dataclass(frozen=True)
class Case:
    """A network and an input to time it on; picklable, so that other processes can build it.

    Attributes:
        name: the name of the case.
        build: makes the compact model.
        input_shape: the shape ``(N, C, H, W)`` of the random input.
        expansions: which parts of the model to expand, and how: pairs of a module name ('' for the
            whole model) and a config whose ``rate`` and ``forward`` the benchmark varies.
        forward: runs a model on the input; returns tensors in any nesting.
        peers: keys of ``PEERS``: other blocks to time in the same layers.
        counted_shape: the shape of an input whose operations are counted without running it.
    """

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, int, int, int]
    expansions: tuple[tuple[str, ExpandConfig], ...] = (('', ExpandConfig('cl')),)
    forward: Callable[[nn.Module, Tensor], Any] = run_model
    peers: tuple[str, ...] = ()
    counted_shape: tuple[int, int, int, int] | None = None

    def images(self) -> Tensor:
        """Return the random input, the same on each call."""
        return torch.randn(self.input_shape, generator=torch.Generator().manual_seed(0))

    def build_variant(self, variant: str, rate: float | None) -> nn.Module:
        """Return the model of a variant, in training mode.

        Args:
            variant: 'compact', 'layerwise', 'folded', 'auto', or a peer; a peer has no rate.
            rate: the expansion rate; None: as the expansions say.
        """
        model = self.build()
        for name, config in self.expansions:
            part = model.get_submodule(name)
            config = replace(config, init='default')  # Weights do not matter.
            if variant in self.peers:
                expand_(part, replace(config, **PEERS[variant]))
            elif variant != COMPACT:
                rate_here = config.rate if rate is None else rate
                expand_(part, replace(config, rate=rate_here, forward=variant))
        model.train()
        return model


def share_parameters_(model: nn.Module, owner: nn.Module) -> None:
    """Let a model use the parameters of another model of the same structure."""
    for mine, theirs in zip(model.modules(), owner.modules(), strict=True):
        parameters_of(mine).update(parameters_of(theirs))
