"""The environment of a run: training without a GPU, and loading of mmengine's checkpoints."""

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
from .compact_config import CPU_WRAPPER, dicts, type_name
from .compat import raw

SYNC_BN = ('SyncBN', 'MMSyncBN', 'SyncBatchNorm')
METHODS = {
    HistoryBuffer: ('min', 'max', 'current', 'mean'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}
"""Methods that a checkpoint may get by ``getattr``, since states of these classes hold them."""
NUMBERS = np.typecodes['AllInteger'] + '?efdFD'
"""Types of numpy arrays that a checkpoint may hold. Each is a single dtype object, which pickle
cannot change; a copy could be turned into a type of pointers."""


def prepare_cpu(cfg: Config) -> None:
    """Adapt a config to a machine without a GPU; with a GPU, do nothing.

    mmengine's launcher would select a CUDA device, so that this function makes a gloo process
    group, which the Runner keeps. SyncBN, which has no CPU implementation, becomes BN, and
    ``sync_bn``, which would convert BN to SyncBN, is removed. State dicts stay the same.

    Args:
        cfg: changed in place.

    Raises:
        ValueError: for a launcher that is unsupported without a GPU.
    """
    if is_cuda_available():
        return
    for node in dicts(raw(cfg)):
        if type_name(node) in SYNC_BN:
            node['type'] = 'BN'
    raw(cfg).pop('sync_bn', None)
    if cfg.get('launcher', 'none') == 'none':
        return
    if cfg.launcher != 'pytorch':
        raise UserValueError(
            f'without a GPU, --launcher {cfg.launcher} is unsupported; use --launcher pytorch'
        )
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    os.environ.setdefault('LOCAL_RANK', '0')
    # Without a wrapper in the config, mmengine's own has the other options of CPU_WRAPPER.
    given = cfg.get('model_wrapper_cfg')
    wrapper = {'type': CPU_WRAPPER['type'], **given} if given else dict(CPU_WRAPPER)
    wrapper['device_ids'] = None
    if cfg.get('find_unused_parameters'):
        wrapper['find_unused_parameters'] = True
    cfg.model_wrapper_cfg = wrapper


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read the checkpoints that mmengine writes.

    From torch 2.6 on ``weights_only=True`` is the default, which breaks resuming and loading:
    HistoryBuffer and OneCycleLR pickle methods through ``getattr``, and numbers are numpy's. This
    function allows safe replacements only: ``getattr`` of these methods, and arrays of numbers.
    They also replace the list of OneDL's mmengine, which allows ``getattr`` of anything and
    disallows its entries after each load.
    """
    if hasattr(checkpoint, 'get_torch_safe_globals'):
        checkpoint.get_torch_safe_globals = list
    torch.serialization.add_safe_globals(
        [
            *METHODS,
            (_method, 'builtins.getattr'),
            (_number_type, 'numpy.dtype'),
            *{type(np.dtype(kind)) for kind in NUMBERS},
            # A file must not call the class itself, which could make an array of pointers. But its
            # state must be set, which torch allows by this name; names in files have a module.
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
    # numpy 2.0 moved these functions; a checkpoint names the module of the numpy that wrote it.
    scalar = np.float64(0).__reduce__()[0]
    return [
        (function, f'{module}.multiarray.{name}')
        for function, name in ((_empty_array, '_reconstruct'), (scalar, 'scalar'))
        for module in ('numpy.core', 'numpy._core')
    ]
