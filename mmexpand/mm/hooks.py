"""The two hooks of a config: one expands before training, one contracts after it."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..core.expression import kernel_refusal
from ..errors import UserError, UserValueError
from ..report import check_report
from ..surgery import ExpandConfig, is_expanded, named_units
from ..surgery.config import takes_options
from .builders import expand_built
from .checkpoints import is_training, put_in_front, unwrap
from .compact_config import type_name
from .contraction import (
    check_writable,
    contract_and_check,
    has_model,
    report_lines,
    warn_of_outliers,
    write_compact_checkpoint,
    write_compact_config,
)
from .dry_run import DryRunHook
from .first_step import watch_first_steps
from .guard import guard_checkpoints
from .logs import log
from .lost_hooks import warn_of_lost_hooks
from .models import configured_expansions
from .ranks import describe, on_main, start_alike
from .rebuild import check_rebuildable, rebuild_optimizer, rewrap
from .resume import will_resume
from .weight_sets import weight_sets


@takes_options
class ExpandHook(Hook):
    """Expands the model before training.

    Validation and tests run the compact network: expanded checkpoints are contracted while they
    are loaded. With ReLU between the factors there is no compact network, and the model is
    expanded for them too.

    The Runner has built the wrapper, the optimizer and the schedulers by then: those that hold
    parameters are built again from its config; of a Runner that was built from keyword arguments,
    the optimizer is given the factors. It runs before EMAHook copies the model. Patterns are
    relative to the whole model.

    Args:
        compact_gradients: whether DDP reduces the gradients of folded kernels, which are of the
            compact network's size, and not the factors'; where a unit's ``forward`` is
            'layerwise' it can't. Default: True.
        warm_start: whether a compact training that is resumed (``--resume`` its checkpoint) goes
            on expanded, the weights preserved, with its schedule and SGD's momentum; what other
            optimizers keep of expanded layers begins anew. Default: False.
        freeze_norms: fraction of the iterations after which norms in branches keep their
            statistics; training then computes exactly the network that is deployed. Default: None,
            never.
        **options: see ``ExpandConfig``.

    Raises:
        TypeError, ValueError: see ``ExpandConfig`` and, once the model is there, ``plan``.
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
        # Of the parameters before the expansion, until the optimizer has been given the factors.
        self._names: dict[int, str] | None = None

    def before_run(self, runner: Runner) -> None:
        """Expand the Runner's model.

        Raises:
            RuntimeError: where the Runner cannot be rebuilt; names the builder to use instead.
            ValueError: for an option that no expanded model can be trained with.
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
        plan = expand_built(model, self.cfg)
        if plan:
            self._names = names
            _warn_of_frozen(model, [layer.name for layer in plan])
        if self._names is None:
            return
        if isinstance(runner.model, DistributedDataParallel):
            rewrap(runner, self.compact_gradients)
        if is_training(runner):
            rebuild_optimizer(runner, self._names)
            self._names = None
            watch_first_steps(runner)

    def before_train(self, runner: Runner) -> None:
        """Start all ranks alike; hand over what a compact training has left, where one goes on."""
        start_alike(unwrap(runner.model))
        self._guard.carry_over(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Freeze norms in branches once their time has come."""
        if self.freeze_norms is None or runner.iter < self.freeze_norms * runner.max_iters:
            return
        for unit in named_units(unwrap(runner.model)).values():
            unit.freeze_norms()
        self.freeze_norms = None
        log(f'ExpandHook: norms in branches keep their statistics from iteration {runner.iter + 1}')


def _warn_of_frozen(model: nn.Module, expanded: list[str]) -> None:
    units = named_units(model)
    frozen = [n for n in expanded if not any(p.requires_grad for p in units[n].parameters())]
    if frozen:
        log(
            f'ExpandHook: {len(frozen)} of them are frozen, {frozen[0]} first, and gain nothing '
            'by it: leave them out with exclude',
            logging.WARNING,
        )


def _check_options(runner: Runner) -> None:
    if runner.cfg.get('efficient_conv_bn_eval'):
        raise UserValueError(
            'efficient_conv_bn_eval traces convolutions, and an expanded one is none: remove it '
            "from the config, or set it on mmcv's ConvModule, which traces nothing"
        )


def _check_order(runner: Runner, hook: ExpandHook) -> None:
    """EMAHook copies what there is; 'preserve' has the network initialised, which is done once."""
    before = runner.hooks[: runner.hooks.index(hook)]
    if any(isinstance(other, EMAHook) for other in before):
        raise UserValueError(
            'EMAHook comes before ExpandHook, and has copied the network that is not expanded: '
            f'leave out the priority of ExpandHook, which is {ExpandHook.priority}'
        )
    # What resumes, or has no initialisation, has nothing to lose.
    starts = is_training(runner) and not will_resume(runner)
    if not starts or not hasattr(unwrap(runner.model), 'init_weights'):
        return
    expanded = [other.cfg for other in before if isinstance(other, ExpandHook)]
    if hook.cfg.init == 'default' and any(cfg.init == 'preserve' for cfg in expanded):
        raise UserValueError(
            "an ExpandHook with init='default' comes after one with 'preserve', which has the "
            'network initialised, so that its own factors would not be: put it in front'
        )


def _check_initialisation(runner: Runner) -> None:
    """What a part preserves, its parent's ``init_cfg`` would write over, factor by factor."""
    if not is_training(runner) or will_resume(runner) or not has_model(runner.cfg):
        return
    given = getattr(unwrap(runner.model), 'init_cfg', None)
    given = given if isinstance(given, (list, tuple)) else [given]
    if not any(_reaches_factors(one) for one in given):
        return
    for name, expansion in configured_expansions(runner.cfg):
        if name and expansion.init == 'preserve':
            raise UserValueError(
                f'model.init_cfg would write over what {name} preserves: use ExpandHook with '
                f"include={name!r} and init='preserve' instead of the builder"
            )


# By these mmengine's initialisations choose layers: a class, or what it is made from.
FACTOR_NAMES = {
    kind.__name__ for layer in (nn.Conv2d, nn.Linear) for kind in (layer, *layer.__bases__)
}


def _reaches_factors(init_cfg: Mapping | None) -> bool:
    """Whether an initialisation is of convolutions or linear layers, which factors are."""
    if init_cfg is None or type_name(init_cfg) == 'Pretrained':
        return False
    layers = init_cfg.get('layer') or ()
    layers = {layers} if isinstance(layers, str) else set(layers)
    # An override initialises all of a part, whatever its layers are.
    return 'override' in init_cfg or bool(layers & FACTOR_NAMES)


def _has_expand_hook(runner: Runner) -> bool:
    """Whether that one expands the model; else a builder has, or nothing."""
    return any(isinstance(hook, ExpandHook) for hook in runner.hooks)


def _check_contractable(model: nn.Module) -> None:
    for name, unit in named_units(model).items():
        if not unit.has_kernel:
            raise UserValueError(
                f'{name} cannot be contracted: {kernel_refusal(unit.expression)}; train this stage '
                'without ContractHook, and start the linear one from its checkpoint with load_from'
            )


class ContractHook(Hook):
    """Writes the compact network after training, verified and evaluated.

    In the work dir: ``compact_last.pth``, ``compact_best.pth`` where ``save_best`` is on,
    ``compact_ema.pth`` where EMAHook is on, and ``compact_config.py``, which stock OpenMMLab
    loads them with; with ``report``, ``report.html``. A dry run on one batch does before the
    first step all that is done after training.

    Args:
        compact_gradients: as for ExpandHook, for a model that ExpandModel or ExpandBackbone has
            expanded.
        evaluate_expanded: whether to evaluate the expanded model too, for comparison: another
            pass over the validation data for each set of weights.
        report: whether to write a page of all this, with curves and predictions.

    Raises:
        ImportError: if a report is wanted, and a package that draws it is missing.
    """

    priority = 'LOWEST'

    def __init__(
        self,
        compact_gradients: bool = True,
        evaluate_expanded: bool = False,
        report: bool = False,
    ):
        self.compact_gradients = compact_gradients
        self.evaluate_expanded = evaluate_expanded
        self.report = report
        if report:
            check_report()

    def before_run(self, runner: Runner) -> None:
        """Treat a model that a builder has expanded as ExpandHook would have.

        Raises:
            CheckpointError: if the run resumes, and no checkpoint in its work dir is whole.
            ValueError: for an option that no expanded model can be trained with, and for ReLU
                between factors.
        """
        _check_contractable(unwrap(runner.model))
        guard_checkpoints(runner)
        if _has_expand_hook(runner) or not is_expanded(unwrap(runner.model)):
            return
        _check_options(runner)
        _check_initialisation(runner)
        if isinstance(runner.model, DistributedDataParallel):
            rewrap(runner, self.compact_gradients)
        if is_training(runner):
            watch_first_steps(runner)
        rebuildable = type(runner) is Runner and isinstance(runner.cfg.get('optim_wrapper'), dict)
        if is_training(runner) and rebuildable and isinstance(runner.optim_wrapper, OptimWrapper):
            rebuild_optimizer(runner)

    def before_train(self, runner: Runner) -> None:
        """Look whether there will be something to contract; it is tried on the first batch."""
        model = unwrap(runner.model)
        if not _has_expand_hook(runner):
            start_alike(model)
        self.expanded = is_expanded(model)
        if not self.expanded:
            log(
                'ContractHook: nothing in this model is expanded, so there will be nothing to '
                'contract; add ExpandHook, or a builder, to the config. Training goes on',
                logging.WARNING,
            )
            return
        on_main(lambda: check_writable(runner.work_dir))
        self._dry_run = DryRunHook(_meta)
        put_in_front(runner, self._dry_run)

    def after_train(self, runner: Runner) -> None:
        """Contract, verify, evaluate and write every set of weights, each on its own.

        Raises:
            ContractionError: at the end, naming the sets for which that failed.
        """
        if not self.expanded:
            return
        failures: dict[str, str] = {}
        written = 0
        for name, find in weight_sets(runner):
            with _collected(failures, name):
                model = find()
                if model is not None:
                    self._contract(runner, name, model)
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
                f'{len(failures)} could not be contracted, and were not written: {reasons}. '
                'What else there is was written; the expanded checkpoints are in the work dir, '
                'for tools/contract.py'
            )

    def _contract(self, runner: Runner, name: str, model: nn.Module) -> None:
        log(f'ContractHook: contracting and verifying the {name} weights')
        result = contract_and_check(model, runner, self.evaluate_expanded, self._dry_run.batch)
        path = Path(runner.work_dir) / f'compact_{name}.pth'
        on_main(lambda: write_compact_checkpoint(result, path, runner.cfg, _meta(runner)))
        for line in report_lines(path.name, result):
            log(line)
        metrics = {k: v for k, v in result.metrics_compact.items() if isinstance(v, float)}
        scalars = {f'compact/{name}/{metric}': value for metric, value in metrics.items()}
        runner.visualizer.add_scalars(scalars, step=runner.iter)
        warn_of_outliers(path.name, result)


def _report(runner: Runner, failures: dict[str, str]) -> None:
    """Write the report; whatever fails in it is no failure of the training."""
    try:
        # It draws with optional packages.
        from .run_report import write_run_report

        notes = [f'{name} could not be contracted: {why}' for name, why in failures.items()]
        path, notes = write_run_report(runner.work_dir, runner.cfg, notes, runner.experiment_name)
        log(f'ContractHook: report {path}')
        for note in notes:
            log(f'ContractHook: not in the report: {note}', logging.WARNING)
    except Exception as error:
        log(f'ContractHook: the report is not written: {describe(error)}', logging.WARNING)


class ContractionError(UserError, RuntimeError):
    """Some sets of weights could not be contracted; the message names each with its reason."""


@contextmanager
def _collected(failures: dict[str, str], name: str) -> Iterator[None]:
    """Go on whatever fails: the next set of weights may be fine."""
    try:
        yield
    except Exception as error:
        failures[name] = describe(error)
        log(f'ContractHook: {name} is not written: {failures[name]}', logging.ERROR)


def _meta(runner: Runner) -> dict:
    return dict(
        dataset_meta=getattr(runner.train_dataloader.dataset, 'metainfo', {}),
        epoch=runner.epoch,
        iter=runner.iter,
        seed=runner.seed,
        experiment_name=runner.experiment_name,
    )
