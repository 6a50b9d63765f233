"""ContractHook, which contracts, verifies and writes the compact network after training."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError, UserValueError
from ..report import check_report
from ..surgery import is_expanded
from .checkpoints import put_in_front, unwrap
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
from .expand_hook import check_options, has_expand_hook
from .first_step import watch_first_steps
from .guard import guard_checkpoints
from .logs import log
from .mean_teacher import check_mean_teacher
from .models import configured_expansions, reaches_factors
from .ranks import describe, on_main, start_alike
from .rebuild import check_wrapper, rebuild_optimizer, rewrap
from .resume import will_resume
from .weight_sets import weight_sets


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
            CheckpointError: if the run resumes and its work dir has no whole checkpoint.
            ValueError: for an option that expanded models do not support, and for ReLU between
                factors.
        """
        check_contractable(unwrap(runner.model))
        guard_checkpoints(runner)
        if has_expand_hook(runner) or not is_expanded(unwrap(runner.model)):
            return
        check_options(runner)
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
        if not has_expand_hook(runner):
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
