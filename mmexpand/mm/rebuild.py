"""A Runner's wrapper, optimizer and schedulers, built again for a model that has changed."""

import copy
import gc

from mmengine.model import MMSeparateDistributedDataParallel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import FlexibleRunner, Runner
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserRuntimeError
from ..surgery.distributed import can_reduce_compact, reduce_compact, release
from .checkpoints import is_training, unwrap
from .logs import log
from .optim import by_layer, stand_ins
from .wrapped_optimizers import check_given

INSTEAD = "use model=dict(type='ExpandModel', model=..., ...) instead of ExpandHook"
"""The way out where a Runner cannot be rebuilt for an expanded model."""


def check_rebuildable(runner: Runner, instead: str = INSTEAD) -> None:
    """Refuse a Runner whose wrapper or strategy cannot be built again.

    Args:
        runner: it is left as it is.
        instead: the way out.

    Raises:
        UserRuntimeError: naming what cannot be.
    """
    if isinstance(runner, FlexibleRunner):
        raise UserRuntimeError(
            f"FlexibleRunner's strategies build model and optimizer in one: {instead}"
        )
    model = runner.model
    separate = isinstance(model, MMSeparateDistributedDataParallel)
    if is_model_wrapper(model) and (separate or not isinstance(model, DistributedDataParallel)):
        raise UserRuntimeError(f'{type(model).__name__} cannot be rebuilt: {instead}')


def rewrap(runner: Runner, compact_gradients: bool) -> None:
    """Build the distributed wrapper again.

    Args:
        runner: with a wrapped model.
        compact_gradients: whether the wrapper is to reduce the gradients of folded kernels, where
            it can.
    """
    model = release(runner.model)
    # The old wrapper's hooks on the remaining parameters go with its last reference.
    runner.model = model
    gc.collect()
    cfg = runner.cfg.get('model_wrapper_cfg')
    if (cfg or {}).get('detect_anomalous_params'):
        log('Gradients are reduced of every factor, for detect_anomalous_params to find it')
        compact_gradients = False
    if compact_gradients and is_training(runner) and can_reduce_compact(model):
        log('Gradients are reduced at the size of the compact network')
        runner.model = reduce_compact(model, lambda m: runner.wrap_model(cfg, m))
    else:
        runner.model = runner.wrap_model(cfg, model)


def rebuild_optimizer(
    runner: Runner, names: dict[int, str] | None = None, instead: str = INSTEAD
) -> None:
    """Build the optimizer and its schedulers again, from the Runner's config.

    Of a Runner that was given an optimizer, that one takes the parameters up.

    Args:
        runner: with a model that has other parameters than its optimizer.
        names: of the compact parameters, by id, that a given optimizer holds.
        instead: the way out where that cannot be.

    Raises:
        RuntimeError: for several optimizers.
    """
    if not isinstance(runner.optim_wrapper, OptimWrapper):
        raise UserRuntimeError(
            f'{type(runner.optim_wrapper).__name__} cannot be rebuilt: {instead}'
        )
    if not isinstance(runner.cfg.get('optim_wrapper'), dict):
        check_given(runner.optim_wrapper.optimizer)
        model = unwrap(runner.model)
        parts = stand_ins(model)
        kept = {id(parameter) for parameter in model.parameters()}
        for group in runner.optim_wrapper.optimizer.param_groups:
            group['params'] = [
                new
                for old in group['params']
                for new in (
                    [old] if id(old) in kept else [part.parameter for part in parts[names[id(old)]]]
                )
            ]
        return
    runner.optim_wrapper = runner.build_optim_wrapper(by_layer(runner.cfg.optim_wrapper))
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    schedulers = runner.cfg.get('param_scheduler')
    if schedulers is not None:
        runner.param_schedulers = runner.build_param_scheduler(copy.deepcopy(schedulers))
