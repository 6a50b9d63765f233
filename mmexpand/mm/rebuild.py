"""Building a Runner's wrapper, optimizer and schedulers again after its model has changed."""

import copy
import gc

from mmengine.model import MMSeparateDistributedDataParallel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserRuntimeError
from ..surgery.distributed import can_reduce_compact, reduce_compact, release
from .checkpoints import unwrap
from .clipping import clip_by_layer
from .compat import is_training
from .logs import log
from .optim import by_layer, single_wrappers, stand_ins
from .wrapped_optimizers import check_given

INSTEAD = "use model=dict(type='ExpandModel', model=..., ...) instead of ExpandHook"
"""The fix if a Runner cannot be built again for an expanded model."""


def check_wrapper(model: nn.Module) -> None:
    """Raise UserRuntimeError for a distributed wrapper that does not support expanded models."""
    separate = isinstance(model, MMSeparateDistributedDataParallel)
    if is_model_wrapper(model) and (separate or not isinstance(model, DistributedDataParallel)):
        raise UserRuntimeError(
            f'{type(model).__name__} does not support expanded models; use '
            'MMDistributedDataParallel'
        )


def check_rebuildable(runner: Runner, instead: str = INSTEAD) -> None:
    """Raise UserRuntimeError if a Runner's wrapper or strategy cannot be built again.

    Args:
        runner: the Runner, which is not changed.
        instead: the fix, for the message.
    """
    if isinstance(runner, FlexibleRunner):
        raise UserRuntimeError(
            f"FlexibleRunner's strategies build model and optimizer in one step: {instead}"
        )
    check_wrapper(runner.model)


def rewrap(runner: Runner, compact_gradients: bool) -> None:
    """Build the distributed wrapper again.

    Args:
        runner: a Runner with a wrapped model.
        compact_gradients: whether to reduce the gradients of folded kernels where possible.
    """
    model = release(runner.model)
    # The old wrapper's hooks on parameters are removed with its last reference.
    runner.model = model
    gc.collect()
    cfg = runner.cfg.get('model_wrapper_cfg')
    if (cfg or {}).get('detect_anomalous_params'):
        log('Gradients of every factor are reduced, as detect_anomalous_params requires')
        compact_gradients = False
    if compact_gradients and is_training(runner) and can_reduce_compact(model):
        log('Gradients are reduced at the size of the compact network')
        runner.model = reduce_compact(model, lambda m: runner.wrap_model(cfg, m))
    else:
        runner.model = runner.wrap_model(cfg, model)


def rebuild_optimizer(
    runner: Runner, names: dict[int, str] | None = None, instead: str = INSTEAD
) -> None:
    """Build the optimizer and its schedulers again from the Runner's config.

    An optimizer that the Runner got as an object is kept and gets the new parameters.

    Args:
        runner: a Runner whose model has other parameters than its optimizer.
        names: names of the compact parameters in an optimizer object, by the parameters' id.
        instead: the fix, for the message.

    Raises:
        RuntimeError: for an optimizer wrapper of another kind.
    """
    if not isinstance(runner.optim_wrapper, OptimWrapper):
        raise UserRuntimeError(
            f'{type(runner.optim_wrapper).__name__} cannot be built again: {instead}'
        )
    if not isinstance(runner.cfg.get('optim_wrapper'), dict):
        for wrapper in single_wrappers(runner.optim_wrapper):
            _hand_over(wrapper, unwrap(runner.model), names)
        return
    runner.optim_wrapper = runner.build_optim_wrapper(by_layer(runner.cfg.optim_wrapper))
    schedulers = runner.cfg.get('param_scheduler')
    if schedulers is not None:
        runner.param_schedulers = copy.deepcopy(schedulers)  # scale_lr refuses built schedulers.
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    if schedulers is not None:
        runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)


def _hand_over(wrapper: OptimWrapper, model: nn.Module, names: dict[int, str]) -> None:
    """Give an optimizer object the factors in the place of the parameters that they replace."""
    check_given(wrapper.optimizer)
    parts = stand_ins(model)
    kept = {id(parameter) for parameter in model.parameters()}
    for group in wrapper.optimizer.param_groups:
        group['params'] = [
            new
            for old in group['params']
            for new in (
                [old] if id(old) in kept else [part.parameter for part in parts[names[id(old)]]]
            )
        ]
    clip_by_layer(wrapper, model)
