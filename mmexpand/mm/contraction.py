"""From an expanded model to files: contract, verify on a real batch, evaluate, write."""

import copy
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import broadcast, broadcast_object_list, is_main_process
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn

from ..surgery import Verification, VerificationError, contract, verify
from ..surgery.checkpoint import META_KEY, save_checkpoint
from ..version import __version__
from .checkpoints import describe_units
from .compact_config import make_compact_config
from .models import tensor_outputs

CONFIG_NAME = 'compact_config.py'


@dataclass
class Contraction:
    """A contracted model with what was found out about it.

    Attributes:
        compact: the compact model, on the device of the expanded one.
        layers: what was expanded, by layer name.
        verification: errors by layer and end to end; None on other ranks than the main one.
        metrics_expanded: of the val loop, before; empty without one.
        metrics_compact: of the val loop, after.
    """

    compact: nn.Module
    layers: dict[str, dict]
    verification: Verification | None
    metrics_expanded: dict[str, float] = field(default_factory=dict)
    metrics_compact: dict[str, float] = field(default_factory=dict)


def contract_and_check(expanded: nn.Module, runner: Runner) -> Contraction:
    """Contract a copy of a model, verify it on a real batch, evaluate both with the val loop.

    To be called on all ranks: the val loop gathers its results from all of them.

    Args:
        expanded: the model; it is left as it was.
        runner: whose data and val loop are used.

    Raises:
        VerificationError: on all ranks, if the compact model computes something else.
    """
    # Every process keeps running statistics of its own; what is evaluated is what is written.
    expanded = copy.deepcopy(expanded)
    for value in expanded.state_dict().values():
        broadcast(value)
    compact = contract(expanded)
    verification = _on_main_process(lambda: _verify(expanded, compact, runner))
    result = Contraction(compact, describe_units(expanded), verification)
    if runner._val_loop is not None:
        result.metrics_expanded = _evaluate(expanded, runner)
        result.metrics_compact = _evaluate(compact, runner)
    return result


def _on_main_process(action: Callable[[], Any]) -> Any:
    outcome: list = [None]
    result = None
    if is_main_process():
        try:
            result = action()
        except VerificationError as error:
            outcome = [str(error)]
    broadcast_object_list(outcome)
    if outcome[0]:
        raise VerificationError(f'{outcome[0]}; nothing was written')
    return result


def contract_without_data(expanded: nn.Module, height: int, width: int) -> Contraction:
    """Contract a copy of a model and verify it on random images, without any data set.

    Args:
        expanded: the model; it is left as it was.
        height: of the images.
        width: of the images.

    Raises:
        VerificationError: if the compact model computes something else.
    """
    compact = contract(expanded)
    data = dict(inputs=torch.randn(2, 3, height, width, device=next(compact.parameters()).device))
    verification = verify(expanded, compact, lambda model: tensor_outputs(model, data))
    return Contraction(compact, describe_units(expanded), verification)


def _verify(expanded: nn.Module, compact: nn.Module, runner: Runner) -> Verification:
    loop = runner.val_loop if runner._val_loop is not None else runner.train_loop
    batch = next(iter(loop.dataloader))
    data = expanded.data_preprocessor(copy.deepcopy(batch), False)
    return verify(expanded, compact, lambda model: tensor_outputs(model, data))


def _evaluate(model: nn.Module, runner: Runner) -> dict[str, float]:
    with _stand_in(runner, model):
        return _plain(runner.val_loop.run())


@contextmanager
def _stand_in(runner: Runner, model: nn.Module) -> Iterator[None]:
    """The runner with another model and no hooks: they would save, log, or swap EMA weights."""
    kept, hooks, modes = runner.model, runner._hooks, {m: m.training for m in model.modules()}
    runner.model, runner._hooks = model, []
    try:
        yield
    finally:
        runner.model, runner._hooks = kept, hooks
        for module, mode in modes.items():
            module.training = mode


def write_compact_checkpoint(result: Contraction, path: Path, cfg: Config, meta: dict) -> None:
    """Write the compact checkpoint, whole or not at all.

    It holds the state dict, the data set's meta and what was found out, in plain values:
    ``torch.load(weights_only=True)`` reads it.

    Args:
        result: of ``contract_and_check``.
        path: the file.
        cfg: the config that was trained.
        meta: what else its ``meta`` shall say, the data set's meta among it.
    """
    report = dict(
        kind='compact',
        version=__version__,
        layers=result.layers,
        metrics_expanded=result.metrics_expanded,
        metrics_compact=result.metrics_compact,
        max_error=result.verification.max_error,
        output_error=result.verification.output,
        layer_errors=result.verification.layers,
    )
    meta = {**meta, 'cfg': make_compact_config(cfg).pretty_text, META_KEY: report}
    state_dict = {name: value.cpu() for name, value in result.compact.state_dict().items()}
    save_checkpoint(dict(meta=_plain(meta), state_dict=state_dict), path)


def write_compact_config(cfg: Config, directory: Path) -> Path:
    """Write the compact config beside the checkpoints; returns its path."""
    path = directory / CONFIG_NAME
    temporary = path.with_name(f'.{os.getpid()}.{path.name}')
    make_compact_config(cfg).dump(temporary)
    os.replace(temporary, path)
    return path


def check_writable(directory: str | os.PathLike) -> None:
    """Refuse a folder that cannot be written to, before any work is lost.

    Raises:
        PermissionError: naming the folder.
    """
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise PermissionError(
            f'cannot write to the work dir {directory} ({error.strerror}); name another one with '
            '--work-dir'
        ) from error


def report_lines(title: str, result: Contraction) -> list[str]:
    """What to tell the user about a contraction, for the log."""
    errors = result.verification
    lines = [
        f'{title}: {len(result.layers)} layers contracted; largest relative error '
        f'{errors.output:.2e} end to end, {errors.layers[errors.worst_layer]:.2e} by layer '
        f'({errors.worst_layer})'
    ]
    lines += [
        f'{title}: {name} {before:.4f} expanded, {result.metrics_compact[name]:.4f} compact'
        for name, before in result.metrics_expanded.items()
        if isinstance(before, float)
    ]
    return lines


def log(message: str, level: int = logging.INFO) -> None:
    """Log to the Runner's logger."""
    print_log(message, logger='current', level=level)


def _plain(value: Any) -> Any:
    """Plain Python values, which need no pickle to be trusted."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    return value
