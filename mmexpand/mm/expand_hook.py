"""ExpandHook, which expands the model before training."""

import logging
from dataclasses import replace
from functools import partial

from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserValueError
from ..surgery import ExpandConfig, named_units
from ..surgery.config import takes_options
from .checkpoints import unwrap
from .compat import is_training
from .contraction import has_model
from .expansion import expand_built
from .first_step import watch_first_steps
from .guard import guard_checkpoints
from .logs import log
from .lost_hooks import warn_of_lost_hooks
from .mean_teacher import check_mean_teacher
from .models import build_compact_model
from .ranks import start_alike
from .rebuild import check_rebuildable, rebuild_optimizer, rewrap
from .resume import will_resume


@takes_options
class ExpandHook(Hook):
    """A hook that expands the model before training.

    ``runner.val()`` and ``runner.test()`` run the compact network: expanded checkpoints are
    contracted while they are loaded. With ReLU between factors no compact network exists, so that
    they run the expanded network.

    The hook runs after the Runner has built wrapper, optimizer and schedulers, and before EMAHook
    copies the model. It builds wrapper, optimizer and schedulers again from the config; an
    optimizer that the Runner got as an object gets the factors. Patterns are relative to the
    whole model.

    Args:
        compact_gradients: whether DDP reduces the gradients of folded kernels, which have the
            compact network's size, instead of the factors'. Requires that no unit's ``forward``
            is 'layerwise'. Default: True.
        warm_start: whether ``--resume`` of a compact checkpoint continues that training expanded,
            with its weights, schedule and SGD's momentum; states of other optimizers for expanded
            layers start empty. Default: False.
        freeze_norms: fraction of the iterations after which norms in branches keep their
            statistics, so that training computes exactly the deployed network. Default: None,
            never.
        **options: see ``ExpandConfig``.

    Raises:
        TypeError, ValueError: see ``ExpandConfig`` and, when the model is expanded, ``plan``.
    """

    priority = 'VERY_HIGH'

    def __init__(
        self,
        compact_gradients: bool = True,
        warm_start: bool = False,
        freeze_norms: float | None = None,
        **options: object,
    ):
        if freeze_norms is not None and not 0 <= freeze_norms <= 1:
            raise UserValueError(
                f'freeze_norms must be a fraction of the training between 0 and 1, got '
                f'{freeze_norms!r}'
            )
        self.compact_gradients = compact_gradients
        self.freeze_norms = freeze_norms
        self.warm_start = warm_start
        self.cfg = ExpandConfig.of(options)
        # Names of the parameters before expansion, by id, until the optimizer is built again.
        self._names: dict[int, str] | None = None

    def before_run(self, runner: Runner) -> None:
        """Expand the Runner's model.

        Raises:
            RuntimeError: if the Runner cannot be built again, naming the builder to use instead.
            ValueError: for an option that expanded models do not support.
        """
        check_options(runner)
        check_rebuildable(runner)
        _check_order(runner, self)
        self._guard = guard_checkpoints(runner)
        self._guard.warm_start |= self.warm_start
        if is_training(runner):
            warn_of_lost_hooks(runner.cfg)
        elif self.cfg.nonlinear is None:
            return
        model = unwrap(runner.model)
        names = {id(p): name for name, p in model.named_parameters()}
        cfg = self.cfg
        if cfg.init == 'auto' and will_resume(runner):
            cfg = replace(cfg, init='default')  # The checkpoint has all weights.
        build = partial(build_compact_model, runner.cfg) if has_model(runner.cfg) else None
        plan = expand_built(model, cfg, build)
        if plan:
            self._names = names
            _warn_of_frozen(model, [layer.name for layer in plan])
            check_mean_teacher(runner)
        if self._names is None:
            return
        if isinstance(runner.model, DistributedDataParallel):
            rewrap(runner, self.compact_gradients)
        if is_training(runner):
            rebuild_optimizer(runner, self._names)
            self._names = None
            watch_first_steps(runner)

    def before_train(self, runner: Runner) -> None:
        """Broadcast the factors, and give the optimizer the state of a warm start."""
        start_alike(unwrap(runner.model))
        self._guard.carry_over(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Freeze norms in branches after ``freeze_norms`` of the iterations."""
        if self.freeze_norms is None or runner.iter < self.freeze_norms * runner.max_iters:
            return
        model = unwrap(runner.model)
        for unit in named_units(model).values():
            unit.freeze_norms()
        start_alike(model)  # Each rank has statistics of its own batches.
        self.freeze_norms = None
        log(f'ExpandHook: norms in branches keep their statistics from iteration {runner.iter + 1}')


def _warn_of_frozen(model: nn.Module, expanded: list[str]) -> None:
    units = named_units(model)
    frozen = [n for n in expanded if not any(p.requires_grad for p in units[n].parameters())]
    if frozen:
        log(
            f'ExpandHook: {len(frozen)} expanded layers are frozen, {frozen[0]} first, and gain '
            'nothing from expansion: skip them with exclude',
            logging.WARNING,
        )


def check_options(runner: Runner) -> None:
    """Raise ValueError for an option of the config that expanded models do not support."""
    if runner.cfg.get('efficient_conv_bn_eval'):
        raise UserValueError(
            'efficient_conv_bn_eval does not support expanded convolutions, which it cannot '
            "trace: remove it from the config, or set it on mmcv's ConvModule, which does not "
            'trace'
        )


def _check_order(runner: Runner, hook: ExpandHook) -> None:
    """Raise ValueError if an earlier hook makes an ExpandHook's expansion wrong.

    EMAHook would copy the compact network. 'preserve' initialises the network, which happens only
    once, so that a later ExpandHook's factors would not be initialised.
    """
    before = runner.hooks[: runner.hooks.index(hook)]
    if any(isinstance(other, EMAHook) for other in before):
        raise UserValueError(
            'EMAHook comes before ExpandHook and has copied the compact network: remove the '
            f'priority of ExpandHook, whose default is {ExpandHook.priority}'
        )
    # Skip resumed runs and models without init_weights.
    starts = is_training(runner) and not will_resume(runner)
    if not starts or not hasattr(unwrap(runner.model), 'init_weights'):
        return
    expanded = [other.cfg for other in before if isinstance(other, ExpandHook)]
    if hook.cfg.init == 'default' and any(cfg.init == 'preserve' for cfg in expanded):
        raise UserValueError(
            "an ExpandHook with init='default' comes after one with 'preserve', which initialises "
            'the network, so that the factors of the later hook would not be initialised: put the '
            "hook with init='default' first"
        )


def has_expand_hook(runner: Runner) -> bool:
    """Return whether a Runner has an ExpandHook."""
    return any(isinstance(hook, ExpandHook) for hook in runner.hooks)
