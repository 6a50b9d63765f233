"""ExpandHook, which expands before training, and ContractHook, which contracts after it."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MethodType

from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError, UserValueError
from ..report import check_report
from ..surgery import ExpandConfig, Plan, expand_, is_expanded, named_units
from ..surgery.config import takes_options
from ..surgery.plan import make_plan
from .checkpoints import DISTILL_LOSSES, put_in_front, unwrap
from .compat import is_training
from .contraction import (
    check_contractable,
    check_writable,
    contract_and_check,
    has_model,
    report_lines,
    run_meta,
    warn_of_outliers,
    write_compact_checkpoint,
    write_compact_config,
)
from .dry_run import DryRunHook
from .first_step import watch_first_steps
from .given import given_layers
from .guard import guard_checkpoints
from .logs import log
from .lost_hooks import warn_of_lost_hooks
from .mean_teacher import check_mean_teacher
from .models import build_compact_model, configured_expansions, reaches_factors
from .ranks import describe, on_main, start_alike
from .rebuild import check_rebuildable, check_wrapper, rebuild_optimizer, rewrap
from .resume import will_resume
from .weight_sets import weight_sets


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
        _check_options(runner)
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


def expand_built(
    module: nn.Module, cfg: ExpandConfig, build: Callable[[], nn.Module] | None = None
) -> Plan:
    """Expand a module that has just been built, before its ``init_weights`` was called.

    'preserve' requires initialised weights, so that ``init_weights`` is called first and skipped
    when the Runner calls it. (mmengine's own ``init_weights`` does nothing a second time, but a
    network's class may extend it by code that would write to the factors.)

    Args:
        module: a module of any class.
        cfg: the options.
        build: builds the module again, for 'auto'; None makes 'auto' the same as 'preserve'.
    """
    given, initialised = None, _is_initialised(module)
    if cfg.init == 'auto' and build is not None and not initialised:
        given = given_layers(module, build)
    # True if the Runner's own call of init_weights will initialise the factors.
    initialise = cfg.init == 'default' or given is not None
    if not initialise and not initialised and hasattr(module, 'init_weights'):
        module.init_weights()
        # A bound method, so that a copy of the module gets a method of its own.
        module.init_weights = MethodType(_init_no_more, module)
    planned = make_plan(module, cfg, given)
    if any(layer.name.startswith(f'{DISTILL_LOSSES}.') for layer in planned):
        # They are not part of the network.
        cfg = replace(cfg, exclude=(*(cfg.exclude or ()), DISTILL_LOSSES))
        planned = make_plan(module, cfg, given)
    if planned:
        more = planned.params_after - planned.params_before
        # 4 bytes for a float32 weight, 12 with its gradient and momentum.
        log(
            f'Expanding {len(planned)} layers: {more:,} more parameters ({4 * more / 1e6:,.1f} MB; '
            f'about {12 * more / 1e6:,.1f} MB with gradients and momentum while training)\n'
            f'{planned}'
        )
    preserved = {
        layer.name: module.get_submodule(layer.name)
        for layer in planned
        if layer.init == 'preserve'
    }
    expand_(module, planned)
    for name, unit in named_units(module).items():
        if unit.given is None:
            layer = preserved.get(name)
            unit.given = [] if layer is None else [(layer.weight, layer.bias)]
    if initialise:
        # Some networks write to a layer's weight in init_weights: units must have one.
        for unit in named_units(module).values():
            unit.offer_weight()
    return planned


def _init_no_more(module: nn.Module) -> None:
    """Skip one call of ``init_weights``, the Runner's, and restore the class's own method."""
    del module.init_weights


def _is_initialised(module: nn.Module) -> bool:
    if 'init_weights' in vars(module):
        return True
    # Only mmengine's modules have is_init; others were initialised by an earlier expansion.
    return getattr(module, 'is_init', is_expanded(module))


def _warn_of_frozen(model: nn.Module, expanded: list[str]) -> None:
    units = named_units(model)
    frozen = [n for n in expanded if not any(p.requires_grad for p in units[n].parameters())]
    if frozen:
        log(
            f'ExpandHook: {len(frozen)} expanded layers are frozen, {frozen[0]} first, and gain '
            'nothing from expansion: skip them with exclude',
            logging.WARNING,
        )


def _check_options(runner: Runner) -> None:
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


def _check_initialisation(runner: Runner) -> None:
    """Raise ValueError if the model's ``init_cfg`` would overwrite preserved factors of a part."""
    if not is_training(runner) or will_resume(runner) or not has_model(runner.cfg):
        return
    given = getattr(unwrap(runner.model), 'init_cfg', None)
    given = given if isinstance(given, (list, tuple)) else [given]
    if not any(reaches_factors(one) for one in given):
        return
    for name, expansion in configured_expansions(runner.cfg):
        if name and expansion.init == 'preserve':
            raise UserValueError(
                f'model.init_cfg would overwrite the preserved weights of {name}: use ExpandHook '
                f"with include={name!r} and init='preserve' instead of the builder"
            )


def _has_expand_hook(runner: Runner) -> bool:
    """Return whether a Runner has an ExpandHook."""
    return any(isinstance(hook, ExpandHook) for hook in runner.hooks)


class ContractHook(Hook):
    """A hook that contracts, verifies, evaluates and writes the compact network after training.

    It writes into the work dir: ``compact_last.pth``, with ``save_best`` ``compact_best.pth``,
    with EMAHook ``compact_ema.pth``, and ``compact_config.py``, with which stock OpenMMLab loads
    them; with ``report``, ``report.html``. A dry run before the first step tries all these steps
    on one batch.

    Args:
        evaluate_expanded: whether to evaluate the expanded model too, which takes another pass
            over the validation data for each weight set.
        report: whether to write a page with results, curves and predictions.

    Raises:
        ImportError: if ``report`` is set and a package that it requires is missing.
    """

    priority = 'LOWEST'

    def __init__(self, evaluate_expanded: bool = False, report: bool = False):
        self.evaluate_expanded = evaluate_expanded
        self.report = report
        if report:
            check_report()

    def before_run(self, runner: Runner) -> None:
        """Build wrapper and optimizer again, as ExpandHook does, if a builder has expanded.

        Raises:
            CheckpointError: if the run resumes and its work dir has no complete checkpoint.
            ValueError: for an option that expanded models do not support, and for ReLU between
                factors.
        """
        check_contractable(unwrap(runner.model))
        guard_checkpoints(runner)
        if _has_expand_hook(runner) or not is_expanded(unwrap(runner.model)):
            return
        _check_options(runner)
        _check_initialisation(runner)
        check_wrapper(runner.model)
        rebuildable = isinstance(runner, Runner)  # FlexibleRunner is not.
        if rebuildable and isinstance(runner.model, DistributedDataParallel):
            rewrap(runner, compact_gradients=True)
        if not is_training(runner):
            return
        watch_first_steps(runner)
        has_config = isinstance(runner.cfg.get('optim_wrapper'), dict)
        if rebuildable and has_config and isinstance(runner.optim_wrapper, OptimWrapper):
            rebuild_optimizer(runner)
        else:
            log('ContractHook: the optimizer is kept: factors have the options of their own names')

    def before_train(self, runner: Runner) -> None:
        """Register the dry run if the model is expanded; otherwise log a warning."""
        model = unwrap(runner.model)
        if not _has_expand_hook(runner):
            start_alike(model)
        self.expanded = is_expanded(model)
        if not self.expanded:
            log(
                'ContractHook: nothing in this model is expanded, so that nothing will be '
                'contracted; add ExpandHook or a builder to the config. Training continues',
                logging.WARNING,
            )
            return
        check_mean_teacher(runner)  # A builder may have expanded the networks.
        on_main(lambda: check_writable(runner.work_dir))
        self._dry_run = DryRunHook()
        put_in_front(runner, self._dry_run)

    def after_train(self, runner: Runner) -> None:
        """Contract, verify, evaluate and write every weight set, each on its own.

        Raises:
            ContractionError: after all sets, naming the sets that failed.
        """
        if not self.expanded:
            return
        failures: dict[str, str] = {}
        written = 0
        for name, find in weight_sets(runner):
            with _collected(failures, name):
                found = find()
                if found is not None:
                    self._contract(runner, name, *found)
                    written += 1
        if written and has_model(runner.cfg):
            with _collected(failures, 'the config'):
                path = on_main(lambda: write_compact_config(runner.cfg, Path(runner.work_dir)))
                log(f'ContractHook: compact config {path}')
        if self.report:
            on_main(lambda: _report(runner, failures))
        if failures:
            reasons = '; '.join(f'{name}: {reason}' for name, reason in failures.items())
            raise ContractionError(
                f'{len(failures)} of the compact files could not be written: {reasons}. The others '
                'are written; use tools/contract.py with the expanded checkpoints in the work dir'
            )

    def _contract(self, runner: Runner, name: str, model: nn.Module, meta: dict) -> None:
        log(f'ContractHook: contracting and verifying the {name} weights')
        result = contract_and_check(model, runner, self.evaluate_expanded, self._dry_run.batch)
        path, meta = Path(runner.work_dir) / f'compact_{name}.pth', {**run_meta(runner), **meta}
        on_main(lambda: write_compact_checkpoint(result, path, runner.cfg, meta))
        for line in report_lines(path.name, result):
            log(line)
        _log_metrics(runner, name, result.metrics_compact)
        warn_of_outliers(path.name, result)


def _log_metrics(runner: Runner, name: str, metrics: dict) -> None:
    """Log the metrics of a weight set to the visualizer's backends, or a warning if one fails."""
    scalars = {f'compact/{name}/{k}': v for k, v in metrics.items() if isinstance(v, float)}
    try:
        runner.visualizer.add_scalars(scalars, step=runner.iter)
    except Exception as error:
        # Only rank 0 logs: a failure there alone would leave the other ranks waiting for it.
        log(f'ContractHook: metrics are not logged: {describe(error)}', logging.WARNING)


def _report(runner: Runner, failures: dict[str, str]) -> None:
    """Write the report, and log a warning if it fails."""
    try:
        # Imported here, since it requires optional packages.
        from .run_report import write_run_report

        notes = [f'{name} could not be contracted: {why}' for name, why in failures.items()]
        path, notes = write_run_report(runner.work_dir, runner.cfg, notes, runner.experiment_name)
        log(f'ContractHook: report {path}')
        for note in notes:
            log(f'ContractHook: not in the report: {note}', logging.WARNING)
    except Exception as error:
        log(f'ContractHook: the report is not written: {describe(error)}', logging.WARNING)


class ContractionError(UserError, RuntimeError):
    """A failure to contract weight sets; the message names each set with its reason."""


@contextmanager
def _collected(failures: dict[str, str], name: str) -> Iterator[None]:
    """Collect a failure in this context and continue: the next weight set may be fine."""
    try:
        yield
    except Exception as error:
        failures[name] = describe(error)
        log(f'ContractHook: {name} is not written: {failures[name]}', logging.ERROR)
