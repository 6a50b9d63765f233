"""Facts of the machine: process groups without a GPU, and mmengine's own checkpoints."""

import os
import pickle
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import is_cuda_available
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler import OneCycleLR, OneCycleParamScheduler

ONE_CYCLE = (OneCycleParamScheduler, OneCycleLR)
"""Schedulers whose state holds one of their own methods."""

CPU_WRAPPER = dict(type='MMDistributedDataParallel', device_ids=None)


def prepare_cpu(cfg: Config) -> None:
    """Let a config run on a machine without a GPU; does nothing where there is one.

    mmengine's launcher selects a CUDA device, so the gloo process group is made here, before the
    Runner, which keeps it. SyncBN, which has no CPU implementation, becomes BN: state dicts are
    the same.

    Args:
        cfg: changed in place.

    Raises:
        ValueError: for a launcher that cannot be used without a GPU.
    """
    if is_cuda_available():
        return
    _replace_sync_bn(cfg._cfg_dict)
    if cfg.get('launcher', 'none') == 'none':
        return
    if cfg.launcher != 'pytorch':
        raise ValueError(f'without a GPU only --launcher pytorch is supported, got {cfg.launcher}')
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    os.environ.setdefault('LOCAL_RANK', '0')
    wrapper = dict(CPU_WRAPPER, **cfg.get('model_wrapper_cfg', {}), device_ids=None)
    if cfg.get('find_unused_parameters'):
        wrapper['find_unused_parameters'] = True
    cfg.model_wrapper_cfg = wrapper


def _replace_sync_bn(node: Any) -> None:
    if isinstance(node, dict):
        if node.get('type') in ('SyncBN', 'MMSyncBN'):
            node['type'] = 'BN'
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            _replace_sync_bn(value)


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read the log history in mmengine's checkpoints.

    From torch 2.6 on that is the default, and a HistoryBuffer, which pickles its methods through
    ``getattr`` and its numbers as numpy arrays, stops resuming and loading. Stand-ins for what
    it needs are allowed, and nothing else: ``getattr`` of these methods only.
    """
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            *ONE_CYCLE,
            (_history_method, 'builtins.getattr'),
            np.ndarray,
            np.dtype,
            *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
            *_numpy_reconstructors(),
        ]
    )


def _history_method(owner: Any, name: str) -> Any:
    if owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(HistoryBuffer, name)
    if owner in ONE_CYCLE and name in ('_annealing_cos', '_annealing_linear'):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f'refused: getattr({owner!r}, {name!r}) in a checkpoint')


def _numpy_reconstructors() -> list:
    # numpy moved these in 2.0; a checkpoint names the module of the numpy that wrote it.
    array = np.zeros(1).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    return [
        (function, f'{module}.multiarray.{function.__name__}')
        for function in (array, scalar)
        for module in ('numpy.core', 'numpy._core')
    ]
