"""Loading of this run's own checkpoints, without running code from the file."""

import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .checkpoint import WEIGHTS_ONLY, CheckpointError, get_state_dict
from .compat import REBUILD

_ALLOWED = {
    ('collections', 'OrderedDict'): OrderedDict,
    **REBUILD,
}


class _Dropped:
    """A stand-in for objects other than weights, which accepts any arguments and holds nothing."""

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


def load_own(path: str | os.PathLike) -> Mapping[str, Any]:
    """Read the tensors and plain values of a checkpoint, without running code from it.

    The metadata of a checkpoint of this run may hold values that
    ``torch.load(weights_only=True)`` refuses; this function skips them.

    Raises:
        CheckpointError: if the file is missing, truncated or corrupt, or if a value of its state
            dict is not a tensor.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f'{path}: no such checkpoint; name an existing file')
    # With this variable set, torch refuses an unpickler other than its own.
    forced = os.environ.pop(WEIGHTS_ONLY, None)
    try:
        # Only weights_only=False accepts another unpickler; this one is stricter than torch's.
        checkpoint = torch.load(path, map_location='cpu', pickle_module=_PICKLE, weights_only=False)
    except Exception as error:
        raise CheckpointError(
            f'{path} is truncated or corrupt ({error}); use an older checkpoint'
        ) from error
    finally:
        if forced is not None:
            os.environ[WEIGHTS_ONLY] = forced
    state_dict = get_state_dict(checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f'{path} holds no state_dict; use a checkpoint of a model')
    strange = [name for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(
            f'{path}: {strange[0]} in its state_dict is not a tensor; save tensors only'
        )
    return checkpoint
