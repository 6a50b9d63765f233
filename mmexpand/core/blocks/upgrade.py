"""Blocks of checkpoints whose norms had no floor under their variances (before 2026-12)."""

from collections.abc import MutableMapping

import torch
from torch import Tensor

from ..statistics import excess

EPS = 1e-5
"""Of the norms in blocks: torch's default."""


def upgrade(block: MutableMapping[str, Tensor], record: str) -> None:
    """Bring the state of a block to the present form; the function that it folds to is the same.

    The record of a present block has one integer more. A norm without a floor divides by less in
    channels of little variance: its weight takes that up.

    Args:
        block: state of a block other than a chain, changed in place; keys may have a prefix.
        record: key of the integers that the block is built from.
    """
    sizes = block[record]
    if len(sizes) % 2:
        return
    for key in [key for key in block if key.endswith('norm.running_var')]:
        weight = key.replace('running_var', 'weight')
        wide = excess(block[key].double(), EPS).sqrt()
        block[weight] = (block[weight] * wide).to(block[weight].dtype)
    block[record] = torch.cat((sizes, sizes.new_ones(1)))
