"""From an expanded model to files: contract, verify on a real batch, evaluate, write."""

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
from ..surgery import Verification, VerificationError, contract_, verify
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
    """A contracted model with what was found out about it.

    Attributes:
        compact: the compact model, on the device of the expanded one.
        layers: what was expanded, by layer name.
        verification: errors by layer and end to end.
        compared: what was compared end to end: 'outputs' or 'features'.
        metrics_compact: of the val loop; empty without one.
        metrics_expanded: of the val loop, before contraction; None if that was not asked for.
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

    To be called on all ranks: the val loop gathers its results from all of them. What fails on
    one rank fails on all.

    Args:
        expanded: the model; it is left as it was.
        runner: whose data and val loop are used.
        evaluate_expanded: whether to evaluate the expanded model too.
        train_batch: of the train loop, for a Runner that does not validate; None: one is read.

    Raises:
        VerificationError: if the compact model computes something else.
        RuntimeError: on ranks where nothing failed, naming the one where something did.
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
        expanded: every rank's gets the state of the main process's.
        batch: of a data loader.
        training: whether of the train loop's.

    Raises:
        VerificationError, RuntimeError: see ``contract_and_check``.
        ValueError: if weights are not finite.
    """
    # Every process keeps running statistics of its own; what is evaluated is what is written.
    broadcast_state(expanded)
    # Losses may wait for those of other ranks: all take the step, and of the same batch.
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
    """Compare an expanded model with one that should compute the same, on a batch.

    Args:
        expanded: an OpenMMLab model with units.
        compact: its contraction, or what it was expanded from with 'preserve'.
        batch: of a data loader.
        training: whether of the train loop's.

    Returns:
        The errors by layer and end to end, and what was compared: 'outputs' or 'features'.

    Raises:
        VerificationError: if they compute something else.
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
                "Verification compares the features that the heads get: mode='tensor' of this "
                f'network does not run on a batch ({describe(error)}). Layers behind are '
                'compared one by one'
            )
    return compare(features), 'features'


def _attempt(mode: str, data: dict) -> Callable[[nn.Module], None]:
    """A step of the model as in training or validation; layers that it may not reach have others.

    It is no part of the comparison, so that it may fail: the data may hold no ground truth.
    """

    def step(model: nn.Module) -> None:
        try:
            model(**copy.deepcopy(data), mode=mode)
        except Exception as error:
            log(
                f'Verification goes on without mode={mode!r}, which does not run in eval mode '
                f'({describe(error)}): layers that only it reaches get random inputs'
            )

    return step


def contract_without_data(expanded: nn.Module, height: int, width: int) -> Contraction:
    """Contract a copy of a model and verify it on random images, without any data set.

    Args:
        expanded: the model; it is left as it was.
        height: of the images.
        width: of the images.

    Raises:
        ValueError: if a weight is not finite.
        VerificationError: if the compact model computes something else.
    """
    _check_finite(expanded)
    compact = contract_(copy_model(expanded))
    shape = (2, input_channels(compact), height, width)
    data = dict(inputs=torch.randn(shape, device=next(compact.parameters()).device))
    verification = verify(expanded, compact, lambda model: tensor_outputs(model, data))
    compared = 'features' if selects_by_score(expanded) else 'outputs'
    return Contraction(compact, describe_units(expanded), verification, compared)


def compact_checkpoint(result: Contraction, cfg: Config, meta: dict) -> dict:
    """The compact checkpoint: the state dict, and in plain values what was found out.

    ``torch.load(weights_only=True)`` reads it.

    Args:
        result: of ``contract_and_check``.
        cfg: the config that was trained.
        meta: what else its ``meta`` shall say, the data set's meta among it.

    Raises:
        TypeError: naming a key of ``meta`` that is no plain value.
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
    state_dict = {
        name: value.cpu() if isinstance(value, torch.Tensor) else plain(value, name)
        for name, value in result.compact.state_dict().items()
    }
    return dict(meta=plain(meta), state_dict=state_dict)


def write_compact_checkpoint(
    result: Contraction, path: Path, cfg: Config, meta: dict
) -> list[Path]:
    """Write the compact checkpoint, whole or not at all; see ``compact_checkpoint``.

    Returns:
        What was written: ``path`` and, where safetensors is installed, the same beside it, unless
        that fails: then the log says why.
    """
    checkpoint = compact_checkpoint(result, cfg, meta)
    save_checkpoint(checkpoint, path)
    if not find_spec('safetensors'):
        return [path]
    beside = path.with_suffix('.safetensors')
    try:
        save_safetensors(checkpoint['state_dict'], beside, checkpoint['meta'])
    except (OSError, TypeError) as error:
        log(f'{beside} was not written: {describe(error)}', logging.WARNING)
        return [path]
    return [path, beside]


def has_model(cfg: Config) -> bool:
    """Whether a config says what the model is: that of a Runner built from parts does not."""
    return isinstance(cfg.get('model'), Mapping)


def write_compact_config(cfg: Config, directory: Path) -> Path:
    """Write the compact config beside the checkpoints; returns its path."""
    path = directory / CONFIG_NAME
    with written_whole(path) as temporary:
        make_compact_config(cfg).dump(temporary)
    return path


def check_writable(directory: str | os.PathLike, option: str = '--work-dir') -> None:
    """Refuse a folder that cannot be written to, before any work is lost.

    Args:
        directory: it is made where it is missing.
        option: what names another one.

    Raises:
        PermissionError: naming the folder.
    """
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserPermissionError(
            f'cannot write to {directory} ({error.strerror}); name another folder with {option}'
        ) from error


def warn_of_outliers(title: str, result: Contraction) -> None:
    """Warn of contracted layers whose kernels hold channels far above the others.

    Norms of branches can scale one channel far above the others.
    """
    for words in outlying_layers(result.compact, result.layers):
        log(
            f'{title}: {words}. In int8 and float16 the small weights beside it are lost: compare '
            'with tools/export_onnx.py --int8 N --evaluate before deploying it',
            logging.WARNING,
        )


def report_lines(title: str, result: Contraction) -> list[str]:
    """What to tell the user about a contraction, for the log."""
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
