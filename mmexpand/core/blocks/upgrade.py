"""Blocks of checkpoints whose norms had no floor under their variances (before 2026-12)."""

from collections.abc import MutableMapping

import torch
from torch import Tensor, nn

from ..expression import Norm
from ..statistics import excess


def upgrade(
    expression: nn.Module, state: MutableMapping[str, Tensor], prefix: str, record: str
) -> None:
    """Bring the state of a block to the present form; it folds to the same kernel.

    The record of a present block has one integer more. A norm without a floor divides by less in
    channels of little variance: the weight of the norm takes that up.

    Args:
        expression: the block.
        state: changed in place.
        prefix: of the block's keys.
        record: key of the integers that the block is built from.
    """
    sizes = state[record]
    if len(sizes) % 2:
        return
    for name, module in expression.named_modules(prefix=prefix.rstrip('.')):
        if isinstance(module, Norm) and module.floored:
            name = f'{name}.'.lstrip('.')
            variance, weight = state[f'{name}norm.running_var'], state[f'{name}norm.weight']
            factor = excess(variance.double(), module.norm.eps).sqrt()
            state[f'{name}norm.weight'] = (weight * factor).to(weight.dtype)
    state[record] = torch.cat((sizes, sizes.new_ones(1)))
