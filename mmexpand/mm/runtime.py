"""Facts of the machine: process groups without a GPU, and mmengine's own checkpoints."""

import os
import pickle
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import is_cuda_available
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner import checkpoint

from ..errors import UserValueError
from .compact_config import CPU_WRAPPER, type_name
from .compat import raw

SYNC_BN = ('SyncBN', 'MMSyncBN', 'SyncBatchNorm')
METHODS = {
    HistoryBuffer: ('min', 'max', 'current', 'mean'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}
"""What a checkpoint may take by ``getattr``: what the states of these classes hold."""
NUMBERS = np.typecodes['AllInteger'] + '?efdFD'
"""Types of numpy arrays that a checkpoint may hold. Of each there is one object, which pickle
cannot change; a copy could be made one of pointers."""


def prepare_cpu(cfg: Config) -> None:
    """Let a config run on a machine without a GPU; does nothing where there is one.

    mmengine's launcher selects a CUDA device, so the gloo process group is made here, before the
    Runner, which keeps it. SyncBN, which has no CPU implementation, becomes BN, and ``sync_bn``,
    which would turn BN into it, goes: state dicts are the same.

    Args:
        cfg: changed in place.

    Raises:
        ValueError: for a launcher that cannot be used without a GPU.
    """
    if is_cuda_available():
        return
    _replace_sync_bn(raw(cfg))
    raw(cfg).pop('sync_bn', None)
    if cfg.get('launcher', 'none') == 'none':
        return
    if cfg.launcher != 'pytorch':
        raise UserValueError(
            f'without a GPU only --launcher pytorch is supported, got {cfg.launcher}'
        )
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    os.environ.setdefault('LOCAL_RANK', '0')
    wrapper = {**CPU_WRAPPER, **(cfg.get('model_wrapper_cfg') or {}), 'device_ids': None}
    if cfg.get('find_unused_parameters'):
        wrapper['find_unused_parameters'] = True
    cfg.model_wrapper_cfg = wrapper


def _replace_sync_bn(node: Any) -> None:
    if isinstance(node, dict):
        if type_name(node) in SYNC_BN:
            node['type'] = 'BN'
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            _replace_sync_bn(value)


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read what mmengine's own checkpoints hold.

    From torch 2.6 on that is the default, and stops resuming and loading: a HistoryBuffer and
    OneCycleLR pickle methods through ``getattr``, and numbers are numpy's. Stand-ins for what
    they need are allowed, and nothing else: ``getattr`` of these methods only, arrays of numbers
    only. They also replace the list of OneDL's mmengine, which allows ``getattr`` of anything, and
    takes back what is in it after each load.
    """
    if hasattr(checkpoint, 'get_torch_safe_globals'):
        checkpoint.get_torch_safe_globals = list
    torch.serialization.add_safe_globals(
        [
            *METHODS,
            (_method, 'builtins.getattr'),
            (_number_type, 'numpy.dtype'),
            *{type(np.dtype(kind)) for kind in NUMBERS},
            # The class itself could be called, and make an array of pointers. It is allowed to
            # have its state set, under a name that no file can say: those have a module.
            ('ndarray', 'numpy.ndarray'),
            (np.ndarray, 'ndarray'),
            *_numpy_reconstructors(),
        ]
    )


def _method(owner: Any, name: str) -> Any:
    if isinstance(owner, type) and name in METHODS.get(owner, ()):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f'refused: getattr({owner!r}, {name!r})')


def _number_type(kind: Any, *_: Any) -> np.dtype:
    if isinstance(kind, str) and kind[:1] in 'biufc' and np.dtype(kind).char in NUMBERS:
        return np.dtype(kind)
    raise pickle.UnpicklingError(f'refused: numpy.dtype({kind!r})')


def _empty_array(*_: Any) -> np.ndarray:
    return np.zeros(0)


def _numpy_reconstructors() -> list:
    # numpy moved these in 2.0; a checkpoint names the module of the numpy that wrote it.
    scalar = np.float64(0).__reduce__()[0]
    return [
        (function, f'{module}.multiarray.{name}')
        for function, name in ((_empty_array, '_reconstruct'), (scalar, 'scalar'))
        for module in ('numpy.core', 'numpy._core')
    ]
