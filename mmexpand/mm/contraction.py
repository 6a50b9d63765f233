"""Contraction of an expanded model: contract, verify on a real batch, evaluate, write files."""

import copy
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from ..errors import UserPermissionError, UserValueError
from ..files import written_whole
from ..surgery import Verification, VerificationError, contract_, named_units, verify
from ..surgery.checkpoint import META_KEY, save_checkpoint, save_safetensors
from ..surgery.copying import copy_model
from ..surgery.outliers import outlying_layers
from ..version import __version__
from .checkpoints import DISTILL_LOSSES, describe_units
from .compact_config import make_compact_config
from .evaluation import evaluate, first_batch, plain, preprocess
from .logs import log
from .models import features, input_channels, selects_by_score, tensor_outputs
from .ranks import broadcast_state, describe, from_main, together

CONFIG_NAME = 'compact_config.py'


@dataclass
class Contraction:
    """A contracted model with its verification and metrics.

    Attributes:
        compact: the compact model, on the device of the expanded model.
        layers: descriptions of the units, by layer name.
        verification: errors by layer and end to end.
        compared: the values that were compared end to end: 'outputs' or 'features'.
        metrics_compact: metrics of the val loop; empty without a val loop.
        metrics_expanded: metrics of the expanded model, or None if it was not evaluated.
    """

    compact: nn.Module
    layers: dict[str, dict]
    verification: Verification
    compared: str = 'outputs'
    metrics_compact: dict[str, float] = field(default_factory=dict)
    metrics_expanded: dict[str, float] | None = None


def contract_and_check(
    expanded: nn.Module, runner: Runner, evaluate_expanded: bool = False, train_batch: Any = None
) -> Contraction:
    """Contract a copy of a model, verify it on a real batch, evaluate it with the val loop.

    Call it on all ranks, since the val loop gathers results from all. A failure on one rank fails
    on all.

    Args:
        expanded: the model, which is not changed.
        runner: the Runner whose data and val loop are used.
        evaluate_expanded: whether to evaluate the expanded model too.
        train_batch: a batch of the train loop, for a Runner without a val loop; None reads one.

    Raises:
        VerificationError: if the outputs of the compact and the expanded model differ.
        RuntimeError: on the other ranks, naming the first rank that failed.
    """
    with together():
        expanded = copy_model(expanded)
        batch, training = first_batch(runner, train_batch)
    result = contract_and_verify(expanded, batch, training)
    result.metrics_compact = evaluate(result.compact, runner)
    if evaluate_expanded:
        result.metrics_expanded = evaluate(expanded, runner)
    return result


def contract_and_verify(expanded: nn.Module, batch: Any, training: bool = False) -> Contraction:
    """Contract a copy of a model and verify it on a batch, on all ranks.

    Args:
        expanded: the model, whose state on all ranks becomes the main process's.
        batch: a batch of a data loader.
        training: whether the batch is the train loop's.

    Raises:
        VerificationError, RuntimeError: see ``contract_and_check``.
        ValueError: if weights are not finite.
    """
    # A copy that EMAHook made before the training still offers the initial weights.
    for unit in named_units(expanded).values():
        unit.take_offered()
    # Each process has running statistics of its own, but all must evaluate the weights that are
    # written.
    broadcast_state(expanded)
    # Losses may communicate: all ranks run the step, on the same batch.
    batch = from_main(batch)
    with together():
        _check_finite(expanded)
        compact = contract_(copy_model(expanded))
        compact._modules.pop(DISTILL_LOSSES, None)
    with together():
        verification, compared = verify_on_batch(expanded, compact, batch, training)
    return Contraction(compact, describe_units(expanded), verification, compared)


def _check_finite(model: nn.Module) -> None:
    bad = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    if bad:
        raise UserValueError(
            f'{len(bad)} weights are not finite, {bad[0]} first: training has diverged; lower '
            'the learning rate, or clip gradients'
        )


def verify_on_batch(
    expanded: nn.Module, compact: nn.Module, batch: Any, training: bool = False
) -> tuple[Verification, str]:
    """Compare an expanded model with its compact model on a batch.

    Args:
        expanded: an OpenMMLab model with units.
        compact: its contraction, or the model that it was expanded from with 'preserve'.
        batch: a batch of a data loader.
        training: whether the batch is the train loop's.

    Returns:
        The errors by layer and end to end, and the values compared: 'outputs' or 'features'.

    Raises:
        VerificationError: if their outputs differ.
    """
    data = preprocess(expanded, batch, training)
    steps = [_attempt(mode, data) for mode in ('predict', 'loss')]

    def compare(forward: Callable) -> Verification:
        return verify(expanded, compact, lambda m: forward(m, copy.deepcopy(data)), steps=steps)

    if not selects_by_score(expanded):
        try:
            return compare(tensor_outputs), 'outputs'
        except VerificationError:
            raise
        except Exception as error:
            log(
                'Verification compares the features that the heads get, and the layers behind '
                f"them one by one: mode='tensor' failed on a batch ({describe(error)})"
            )
    return compare(features), 'features'


def _attempt(mode: str, data: dict) -> Callable[[nn.Module], None]:
    """Return a step that runs the model in a mode and logs a failure.

    The step only gives layers an input. It may fail, since the data may hold no ground truth.
    """

    def step(model: nn.Module) -> None:
        try:
            model(**copy.deepcopy(data), mode=mode)
        except Exception as error:
            log(
                f'Verification skipped mode={mode!r}, which failed in eval mode '
                f'({describe(error)}): layers that only this mode reaches get random inputs'
            )

    return step


def contract_without_data(expanded: nn.Module, height: int, width: int) -> Contraction:
    """Contract a copy of a model and verify it on random images, without a data set.

    Height and width of the images are in pixels.

    Raises:
        ValueError: if a weight is not finite.
        VerificationError: if the outputs of the compact and the expanded model differ.
    """
    _check_finite(expanded)
    compact = contract_(copy_model(expanded))
    shape = (2, input_channels(compact), height, width)
    data = dict(inputs=torch.randn(shape, device=next(compact.parameters()).device))
    verification = verify(expanded, compact, lambda model: tensor_outputs(model, data))
    compared = 'features' if selects_by_score(expanded) else 'outputs'
    return Contraction(compact, describe_units(expanded), verification, compared)


def run_meta(runner: Runner) -> dict[str, Any]:
    """Return the entries of a compact checkpoint's ``meta`` that describe its training."""
    return dict(
        dataset_meta=getattr(runner.train_dataloader.dataset, 'metainfo', {}),
        epoch=runner.epoch,
        iter=runner.iter,
        seed=runner.seed,
        experiment_name=runner.experiment_name,
    )


def compact_checkpoint(result: Contraction, cfg: Config, meta: dict) -> dict:
    """Return the compact checkpoint, which ``torch.load(weights_only=True)`` can read.

    Args:
        result: the result of ``contract_and_check``.
        cfg: the config that was trained.
        meta: further entries of the checkpoint's ``meta``, such as the data set's meta.

    Returns:
        ``state_dict`` and ``meta``, which holds verification and metrics as plain values.

    Raises:
        TypeError: naming a key of ``meta`` whose value is not plain.
    """
    verification = result.verification
    report = dict(
        kind='compact',
        version=__version__,
        layers=result.layers,
        metrics_compact=result.metrics_compact,
        max_error=verification.max_error,
        output_error=verification.output,
        compared=result.compared,
        layer_errors=verification.layers,
        verified_on=verification.how,
    )
    if result.metrics_expanded is not None:
        report['metrics_expanded'] = result.metrics_expanded
    meta = {**meta, 'cfg': make_compact_config(cfg).pretty_text, META_KEY: report}
    # In place: heads of mmdet convert weights of an earlier version, which the dictionary states.
    state_dict = result.compact.state_dict()
    for name, value in state_dict.items():
        state_dict[name] = value.cpu() if isinstance(value, torch.Tensor) else plain(value, name)
    return dict(meta=plain(meta), state_dict=state_dict)


def write_compact_checkpoint(
    result: Contraction, path: Path, cfg: Config, meta: dict
) -> list[Path]:
    """Write the compact checkpoint, whole or not at all; see ``compact_checkpoint``.

    Returns:
        The written files: ``path`` and, with safetensors installed, a .safetensors file beside
        it. If the latter fails, a warning is logged.
    """
    checkpoint = compact_checkpoint(result, cfg, meta)
    save_checkpoint(checkpoint, path)
    if not find_spec('safetensors'):
        return [path]
    beside = path.with_suffix('.safetensors')
    try:
        save_safetensors(checkpoint['state_dict'], beside, checkpoint['meta'])
    except Exception as error:  # safetensors reports a full disk by an error of its own class.
        log(f'{beside} was not written: {describe(error)}', logging.WARNING)
        return [path]
    return [path, beside]


def has_model(cfg: Config) -> bool:
    """Return whether a config has the model's config; a Runner built from objects has none."""
    return isinstance(cfg.get('model'), Mapping)


def write_compact_config(cfg: Config, directory: Path) -> Path:
    """Write the compact config into a folder and return its path."""
    path = directory / CONFIG_NAME
    with written_whole(path) as temporary:
        make_compact_config(cfg).dump(temporary)
    return path


def check_writable(directory: str | os.PathLike, option: str = '--work-dir', fix: str = '') -> None:
    """Raise PermissionError if a folder cannot be written to, before work is lost.

    Args:
        directory: the folder, which is made if it is missing.
        option: the option that names another folder, for the message.
        fix: instead of the option, the fix for the message.
    """
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserPermissionError(
            f'cannot write to {directory} ({error.strerror}); '
            + (fix or f'name another folder with {option}')
        ) from error


def warn_of_outliers(title: str, result: Contraction) -> None:
    """Log a warning for each contracted layer with a channel far above the others.

    Norms of branches can scale one channel that far.
    """
    for words in outlying_layers(result.compact, result.layers):
        log(
            f'{title}: {words}. int8 and float16 lose the small weights beside it: compare with '
            'tools/export_onnx.py --int8 N --evaluate before deploying it',
            logging.WARNING,
        )


def report_lines(title: str, result: Contraction) -> list[str]:
    """Return the lines of the log that describe a contraction."""
    errors = result.verification
    lines = [
        f'{title}: {len(result.layers)} layers contracted; largest relative error '
        f'{errors.output:.2e} end to end ({result.compared}), '
        f'{errors.layers[errors.worst_layer]:.2e} by layer ({errors.worst_layer})'
    ]
    lines += [f'  {name}: {error:.2e} {errors.how[name]}' for name, error in errors.layers.items()]
    for name, value in result.metrics_compact.items():
        before = (result.metrics_expanded or {}).get(name)
        if isinstance(value, float):
            compared = '' if before is None else f', {before:.4f} expanded'
            lines.append(f'{title}: {name} {value:.4f} compact{compared}')
    return lines


def check_contractable(model: nn.Module) -> None:
    """Raise ValueError if a unit has no kernel, as with ReLU between the factors."""
    for name, unit in named_units(model).items():
        if not unit.has_kernel:
            raise UserValueError(
                f'{name} cannot be contracted: {unit.expression.kernel_refusal()}; train without '
                'ContractHook, and start a linear training from its checkpoint with load_from'
            )
