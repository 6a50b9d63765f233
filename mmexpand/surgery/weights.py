"""The weights in a checkpoint, whatever else is in it, without running code from it."""

import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .checkpoint import WEIGHTS_ONLY, CheckpointError, get_state_dict

_ALLOWED = {
    ('collections', 'OrderedDict'): OrderedDict,
    ('torch._utils', '_rebuild_tensor_v2'): torch._utils._rebuild_tensor_v2,
    ('torch._utils', '_rebuild_parameter'): torch._utils._rebuild_parameter,
}


class _Dropped:
    """Stands for what is no weight: takes whatever it is given, and holds nothing."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def _take(self, *args: object) -> None:
        pass

    __setstate__ = __setitem__ = __call__ = append = extend = add = _take


class _WeightsUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _ALLOWED.get((module, name), _Dropped)


_PICKLE = SimpleNamespace(
    __name__='weights',
    Unpickler=_WeightsUnpickler,
    load=lambda file, **kwargs: _WeightsUnpickler(file, **kwargs).load(),
)


def load_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint; nothing else in it is built, and nothing is run.

    For a checkpoint that this run has written: its metadata may hold what
    ``torch.load(weights_only=True)`` refuses, and is not needed.

    Args:
        path: the file.

    Raises:
        CheckpointError: if it is missing, truncated or corrupt, or holds something else than
            tensors among its weights.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f'{path}: no such checkpoint')
    # torch refuses any other unpickler than its own where only weights may be loaded.
    forced = os.environ.pop(WEIGHTS_ONLY, None)
    try:
        # weights_only=False is what lets the unpickler be chosen: this one is stricter.
        checkpoint = torch.load(path, map_location='cpu', pickle_module=_PICKLE, weights_only=False)
    except Exception as error:
        raise CheckpointError(f'{path} is truncated or corrupt ({error})') from error
    finally:
        if forced is not None:
            os.environ[WEIGHTS_ONLY] = forced
    state_dict = get_state_dict(checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f'{path} holds no state_dict')
    strange = [name for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(f'{path}: {strange[0]} in its state_dict is no tensor')
    return dict(state_dict)
