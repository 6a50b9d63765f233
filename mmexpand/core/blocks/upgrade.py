"""Conversion of checkpoints of former versions to the present form.

Before 2026-12 norms had no floor under their variances, options of a block were part of its name,
and the norm of 'bn' was the only branch of a sum.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..expression import Norm
from ..layer_spec import SPEC_KEY, LayerSpec
from ..options import BlockOptions
from ..statistics import excess
from . import ALIASES, build_expression

RENAMED = {
    **ALIASES,
    'cl_shortcut': ('cl', BlockOptions(shortcut=True)),
    'ck_shortcut': ('ck', BlockOptions(shortcut=True)),
    'cl_relu': ('cl', BlockOptions(nonlinear='relu')),
    'ck_relu': ('ck', BlockOptions(nonlinear='relu')),
    'fc_relu': ('fc', BlockOptions(nonlinear='relu')),
}
"""Former names of blocks, each with its present block and options."""


def upgraded(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a state dict in the present form; its blocks fold to the same kernels.

    Args:
        state_dict: the state dict of a model or unit, which is not changed. Its order is kept.
    """
    renamed, changed = {}, {}
    for key in [key for key in state_dict if key.split('.')[-1] == SPEC_KEY]:
        root = key.rpartition('.')[0]
        *layer, block = root.split('.')
        name, options = RENAMED.get(block, (block, BlockOptions()))
        record = state_dict[key].clone()
        unfloored = len(record) % 2 == 0
        if unfloored:
            record = torch.cat((record, record.new_ones(1)))
        record[-1] += 2 * options.encode()
        if unfloored or name != block:
            changed[key] = record
        if unfloored:
            changed.update(_floored(state_dict, root, name, record))
        first = f'{root}.0.' if name == 'bn' else f'{root}.'
        if name != block or (name == 'bn' and f'{first}norm.weight' in state_dict):
            renamed[first] = '.'.join([*layer, name, ''])
            renamed[f'{root}.'] = renamed[first]
    if not changed and not renamed:
        return state_dict
    result = {}
    for key, value in state_dict.items():
        old = next((prefix for prefix in renamed if key.startswith(prefix)), '')
        result[renamed.get(old, '') + key.removeprefix(old)] = changed.get(key, value)
    return result


def _floored(
    state_dict: Mapping[str, Tensor], root: str, name: str, record: Tensor
) -> dict[str, Tensor]:
    """Return the weights of a block's norms, multiplied to cancel the effect of the floor."""
    weights = {}
    spec = LayerSpec.from_record(record, torch.empty(0, device='meta'))
    first = f'{root}.0' if name == 'bn' else root
    for path, module in build_expression(name, spec).named_modules(prefix=first):
        if isinstance(module, Norm) and module.floored:
            variance = state_dict[f'{path}.norm.running_var']
            weight = state_dict[f'{path}.norm.weight']
            factor = excess(variance.double(), module.norm.eps).sqrt()
            weights[f'{path}.norm.weight'] = (weight * factor).to(weight.dtype)
    return weights
