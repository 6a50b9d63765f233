"""The two hooks of a config: one expands before training, one contracts after it."""

import copy
import gc
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.model import MMSeparateDistributedDataParallel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..surgery import ExpandConfig, copy_model, is_expanded
from ..surgery.checkpoint import load_checkpoint, load_weights
from ..surgery.distributed import can_reduce_compact, reduce_compact
from .builders import expand_built
from .checkpoints import CheckpointGuardHook, is_training, match_checkpoint, unwrap
from .contraction import (
    Contraction,
    ContractionError,
    check_writable,
    contract_and_check,
    log,
    rehearse,
    report_lines,
    together,
    write_compact_checkpoint,
    write_compact_config,
)
from .models import build_compact_model
from .optim import by_layer, stand_ins


class ExpandHook(CheckpointGuardHook):
    """Expands the model before training, validation or test.

    The Runner has built the wrapper, the optimizer and the schedulers by then: those that hold
    parameters are built again from its config; of a Runner that was built from keyword arguments,
    the optimizer is given the factors. It runs before EMAHook copies the model.

    Args:
        compact_gradients: whether DDP reduces the gradients of folded kernels, which are of the
            compact network's size, and not the factors'; where a unit's ``forward`` is
            'layerwise' it can't.
        **expand: fields of ``ExpandConfig``; patterns are relative to the whole model.

    Raises:
        TypeError, ValueError: see ``ExpandConfig`` and, once the model is there, ``plan``.
    """

    def __init__(self, compact_gradients: bool = True, **expand: object):
        self.compact_gradients = compact_gradients
        self.cfg = ExpandConfig(**expand)

    def before_run(self, runner: Runner) -> None:
        """Expand the Runner's model.

        Raises:
            RuntimeError: where the Runner cannot be rebuilt; names the builder to use instead.
        """
        _check_rebuildable(runner)
        model = unwrap(runner.model)
        params = sum(p.numel() for p in model.parameters())
        names = {id(p): name for name, p in model.named_parameters()}
        # Without training the weights come from a checkpoint: none is to be initialised (or
        # fetched, where init_cfg says Pretrained) just to be preserved.
        cfg = self.cfg if is_training(runner) else replace(self.cfg, init='default')
        plan = expand_built(model, cfg)
        if not plan:
            return
        sizes = f'{params:,} -> {plan.params_after:,} parameters'
        log(f'ExpandHook: {len(plan)} layers expanded, {sizes}')
        for layer in plan:
            log(
                f'  {", ".join(layer.names)}: {layer.method.upper()}, rate {layer.rate}, '
                f'{layer.params_before:,} -> {layer.params_after:,} parameters'
            )
        if isinstance(runner.model, DistributedDataParallel):
            _rewrap(runner, self.compact_gradients)
        if is_training(runner):
            _rebuild_optimizer(runner, names)


def _rewrap(runner: Runner, compact_gradients: bool) -> None:
    model = unwrap(runner.model)
    # The old wrapper's hooks on the remaining parameters go with its last reference.
    runner.model = model
    gc.collect()
    cfg = runner.cfg.get('model_wrapper_cfg')
    if compact_gradients and is_training(runner) and can_reduce_compact(model):
        log('Gradients are reduced at the size of the compact network')
        runner.model = reduce_compact(model, lambda m: runner.wrap_model(cfg, m))
    else:
        runner.model = runner.wrap_model(cfg, model)


def _check_rebuildable(runner: Runner) -> None:
    instead = "use model=dict(type='ExpandModel', model=..., ...) instead of ExpandHook"
    if isinstance(runner, FlexibleRunner):
        raise RuntimeError(
            f"FlexibleRunner's strategies build model and optimizer in one: {instead}"
        )
    model = runner.model
    separate = isinstance(model, MMSeparateDistributedDataParallel)
    if is_model_wrapper(model) and (separate or not isinstance(model, DistributedDataParallel)):
        raise RuntimeError(f'{type(model).__name__} cannot be rebuilt: {instead}')


def _rebuild_optimizer(runner: Runner, names: dict[int, str] | None = None) -> None:
    if not isinstance(runner.optim_wrapper, OptimWrapper):
        raise RuntimeError(
            f'{type(runner.optim_wrapper).__name__} is not supported by ExpandHook; use '
            "model=dict(type='ExpandModel', model=..., ...) instead"
        )
    if not isinstance(runner.cfg.get('optim_wrapper'), dict):
        parts = stand_ins(unwrap(runner.model))
        for group in runner.optim_wrapper.optimizer.param_groups:
            held = [parts[names[id(parameter)]] for parameter in group['params']]
            group['params'] = [part.parameter for some in held for part in some]
        return
    runner.optim_wrapper = runner.build_optim_wrapper(by_layer(runner.cfg.optim_wrapper))
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    schedulers = runner.cfg.get('param_scheduler')
    if schedulers is not None:
        runner.param_schedulers = runner.build_param_scheduler(copy.deepcopy(schedulers))


class ContractHook(CheckpointGuardHook):
    """Writes the compact network after training, verified and evaluated.

    In the work dir: ``compact_last.pth``, ``compact_best.pth`` where ``save_best`` is on,
    ``compact_ema.pth`` where EMAHook is on, and ``compact_config.py``, which stock OpenMMLab
    loads them with.

    Args:
        compact_gradients: as for ExpandHook, for a model that ExpandModel or ExpandBackbone has
            expanded.
        evaluate_expanded: whether to evaluate the expanded network as well as the compact one.
    """

    priority = 'LOWEST'

    def __init__(self, compact_gradients: bool = True, evaluate_expanded: bool = False):
        self.compact_gradients = compact_gradients
        self.evaluate_expanded = evaluate_expanded

    def before_run(self, runner: Runner) -> None:
        """Treat a model that a builder has expanded as ExpandHook would have."""
        builder = not any(isinstance(hook, ExpandHook) for hook in runner.hooks)
        if not builder or not is_expanded(unwrap(runner.model)):
            return
        if isinstance(runner.model, DistributedDataParallel):
            _rewrap(runner, self.compact_gradients)
        rebuildable = type(runner) is Runner and isinstance(runner.cfg.get('optim_wrapper'), dict)
        if is_training(runner) and rebuildable and isinstance(runner.optim_wrapper, OptimWrapper):
            _rebuild_optimizer(runner)

    def before_train(self, runner: Runner) -> None:
        """Look whether there will be something to contract, and rehearse it on one batch.

        Raises:
            ContractionError: naming what would fail after training.
            PermissionError: if the work dir cannot be written to.
        """
        self.expanded = is_expanded(unwrap(runner.model))
        if not self.expanded:
            log(
                'ContractHook: nothing in this model is expanded, so there will be nothing to '
                'contract; add ExpandHook, or a builder, to the config. Training goes on',
                logging.WARNING,
            )
            return
        if is_main_process():
            check_writable(runner.work_dir)
        try:
            rehearse(unwrap(runner.model), runner, lambda result: self._rehearse(runner, result))
        except ContractionError as error:
            raise ContractionError(
                f'before the first iteration: contracting this model would fail: {error}. Leave '
                'the layer out (exclude of ExpandHook), or mend what it names'
            ) from None
        log(
            'ContractHook: rehearsed on one batch: contract, verify, evaluate, write, and load '
            'in the compact config'
        )

    def _rehearse(self, runner: Runner, result: Contraction) -> None:
        """Write and load what there will be to write, in a folder that goes away."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / 'compact.pth'
            write_compact_checkpoint(result, path, runner.cfg, self._meta(runner))
            config = _write_config(runner, Path(directory))
            if config:
                build_compact_model(Config.fromfile(config)).load_state_dict(load_weights(path))
            load_checkpoint(path)

    def after_train(self, runner: Runner) -> None:
        """Contract, verify, evaluate and write every set of weights, each on its own.

        Raises:
            ContractionError: at the end, naming the sets that failed; the others are written.
        """
        if not self.expanded:
            return
        failed = {}
        for name, load in self._weight_sets(runner):
            log(f'ContractHook: contracting and verifying the {name} weights')
            try:
                model = load()
                result = contract_and_check(model, runner, self.evaluate_expanded)
                together(partial(self._write, runner, name, result))
            except ContractionError as error:
                failed[name] = str(error)
                log(f'ContractHook: the {name} weights: {error}', logging.ERROR)
        if failed:
            reasons = '; '.join(f'{name}: {reason}' for name, reason in failed.items())
            raise ContractionError(
                f'compact checkpoints that could not be written to {runner.work_dir}: {reasons}. '
                "The training's own checkpoints are there; tools/contract.py contracts them"
            )

    def _weight_sets(self, runner: Runner) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
        """Names of the sets of weights there are, each with what gives a model with them."""
        model = unwrap(runner.model)
        yield 'last', lambda: model
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                yield 'ema', lambda hook=hook: hook.ema_model.module
            elif isinstance(hook, CheckpointHook) and hook.save_best:
                for name, path in _best_checkpoints(hook):
                    found = [Path(path).is_file()]
                    broadcast_object_list(found)
                    if found[0]:
                        yield name, lambda path=path: _loaded_copy(model, path)
                    else:
                        log(
                            f'ContractHook: the {name} checkpoint, {path}, is not there any more; '
                            f'no compact_{name}.pth is written',
                            logging.WARNING,
                        )

    def _write(self, runner: Runner, name: str, result: Contraction) -> None:
        if not is_main_process():
            return
        path = Path(runner.work_dir) / f'compact_{name}.pth'
        write_compact_checkpoint(result, path, runner.cfg, self._meta(runner))
        config = _write_config(runner, path.parent)
        for line in report_lines(path.name, result):
            log(line)
        log(f'ContractHook: wrote {path}; compact config {config or "none: the Runner has none"}')

    def _meta(self, runner: Runner) -> dict:
        return dict(
            dataset_meta=getattr(runner.train_dataloader.dataset, 'metainfo', {}),
            epoch=runner.epoch,
            iter=runner.iter,
            seed=runner.seed,
            experiment_name=runner.experiment_name,
        )


def _write_config(runner: Runner, directory: Path) -> Path | None:
    # A Runner built from keyword arguments alone does not know what its model was built from.
    return write_compact_config(runner.cfg, directory) if 'model' in runner.cfg else None


def _best_checkpoints(hook: CheckpointHook) -> list[tuple[str, str]]:
    if len(hook.key_indicators) == 1:
        return [('best', hook.best_ckpt_path)] if hook.best_ckpt_path else []
    return [
        (f'best_{key.replace("/", "_")}', path)
        for key, path in hook.best_ckpt_path_dict.items()
        if path
    ]


def _loaded_copy(model: nn.Module, path: str) -> nn.Module:
    # Read once, by the main process: the others may have no access to its disk. The weights
    # alone: what else this run has put into its checkpoint is not needed.
    content = [together(lambda: load_weights(path) if is_main_process() else None)]
    broadcast_object_list(content)
    return together(lambda: _with_weights(model, content[0]))


def _with_weights(model: nn.Module, state_dict: dict) -> nn.Module:
    model = copy_model(model)
    match_checkpoint(model, dict(state_dict=state_dict), training=True, resume=True)
    model.load_state_dict(state_dict)
    return model
