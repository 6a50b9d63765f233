"""One training step: compact, expanded in every forward, and peers; time, memory and traffic."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ..errors import UserRuntimeError
from ..surgery import named_units
from ..surgery.verify import full_precision
from .bounds import CountedStep, FoldingBound, counted_step, folding_bound, measure_rates
from .cases import COMPACT, OURS, Case, share_parameters_
from .footprint import (
    OutOfMemoryError,
    ReducedBytes,
    SavedBytes,
    peak_memory,
    reduced_bytes,
    saved_bytes,
    tensors_in,
)
from .steps import Progress, Settings, StepTimes, Trainer, make_optimizer, time_in_turns

TOLERANCE = 1e-2
"""Largest difference, relative to the largest output, between the forwards in float32 on the same
factors: far above rounding, far below what a wrong product gives."""


@dataclass(frozen=True)
class Seconds:
    """Minimum and median of many steps."""

    min: float
    median: float

    @classmethod
    def of(cls, times: Sequence[float]) -> 'Seconds':
        """Return the minimum and median of times in seconds."""
        return cls(min(times), median(times))


@dataclass(frozen=True)
class Footprint:
    """Memory and traffic of a variant; see ``saved_bytes``, ``reduced_bytes``, ``peak_memory``.

    Attributes:
        parameters: number of trained parameters.
        saved: bytes saved for backward.
        reduced: bytes of gradients that distributed training reduces in a step.
        peak_memory: peak resident bytes of a process that trains this variant alone.
        difference: largest difference between the outputs and those of the chain with the same
            factors, relative to the largest output; None without factors.
    """

    parameters: int
    saved: SavedBytes
    reduced: ReducedBytes
    peak_memory: int
    difference: float | None


@dataclass(frozen=True)
class VariantResult:
    """Measurements of one variant of a model.

    Attributes:
        steps: number of steps timed.
        step, forward, backward, optimizer: times of the whole step and of its parts. The loss
            belongs to forward, freeing the gradients to optimizer.
        ratio: the step relative to the compact model's: of the minima, and of the medians.
        footprint: its memory and traffic.
    """

    steps: int
    step: Seconds
    forward: Seconds
    backward: Seconds
    optimizer: Seconds
    ratio: Seconds
    footprint: Footprint


@dataclass(frozen=True)
class GroupResult:
    """All variants of a case at one expansion rate, timed in turns.

    Attributes:
        case: name of the case.
        rate: the expansion rate; None: as the case's expansions say.
        input_shape: ``(N, C, H, W)``.
        variants: results by name: 'compact', 'layerwise', 'folded', 'auto', and peers.
        left_out: variants that failed, with the reason.
        bound: the bound of the folded step; None if that failed.
        counted: operations at the case's ``counted_shape``, if it has one.
    """

    case: str
    rate: float | None
    input_shape: tuple[int, ...]
    variants: dict[str, VariantResult]
    left_out: dict[str, str]
    bound: FoldingBound | None
    counted: CountedStep | None


def run_group(
    case: Case,
    rate: float | None,
    settings: Settings,
    progress: Progress = lambda what, done, total: None,
) -> GroupResult:
    """Measure all variants of a case at one expansion rate.

    Each variant is first trained in a separate process, for its peak memory. A variant that does
    not fit into memory is left out. The three forwards share their factors and optimizer.

    Args:
        case: the network and its input.
        rate: the expansion rate; None: as the case's expansions say.
        settings: how to measure.
        progress: called with the progress.

    Raises:
        OutOfMemoryError: if the compact model does not fit into memory.
        RuntimeError: if the forwards differ on the same factors.
    """
    torch.set_num_threads(settings.threads)
    gc.collect()  # models of an earlier group, before this group allocates its own
    counted = _count(case, rate)
    peaks, left_out = _measure_peaks(case, rate, settings, progress)
    trainers = _build_trainers(list(peaks), case, rate, settings)
    progress('bytes saved for backward', 0, 1)
    footprints = _measure_footprints(trainers, peaks, case.name)
    rates = measure_rates(settings.device)
    times = time_in_turns({k: trainer.step for k, trainer in trainers.items()}, settings, progress)
    variants = {k: _result(times[k], times[COMPACT], footprints[k]) for k in trainers}
    bound = None
    if 'folded' in trainers:
        models = trainers['folded'].model, trainers[COMPACT].model
        bound = folding_bound(*models, variants[COMPACT].step.min, rates)
    return GroupResult(case.name, rate, case.input_shape, variants, left_out, bound, counted)


def _count(case: Case, rate: float | None) -> CountedStep | None:
    if case.counted_shape is None:
        return None
    # On 'meta' from the start: the parameters of a high rate take gigabytes.
    with torch.device('meta'):
        models = case.build_variant('folded', rate), case.build_variant(COMPACT, rate)
    return counted_step(*models, case.counted_shape, case.forward)


def _measure_peaks(
    case: Case, rate: float | None, settings: Settings, progress: Progress
) -> tuple[dict[str, int], dict[str, str]]:
    peaks, left_out = {}, {}
    names = (COMPACT, *OURS, *case.peers)
    for done, name in enumerate(names):
        progress(f'peak memory of {name}', done, len(names))
        try:
            arguments = case, name, rate, settings
            peaks[name] = peak_memory(
                _train_briefly, *arguments, threads=settings.threads, device=settings.device
            )
        except OutOfMemoryError as error:
            if name == COMPACT:
                raise
            left_out[name] = str(error)
    return peaks, left_out


def _train_briefly(case: Case, variant: str, rate: float | None, settings: Settings) -> None:
    trainer = _build_trainer(case, variant, rate, settings)
    # From the second step on the momentum exists.
    for _ in range(2):
        trainer.step()


def _build_trainer(case: Case, variant: str, rate: float | None, settings: Settings) -> Trainer:
    torch.manual_seed(0)
    model = case.build_variant(variant, rate).to(settings.device)
    optimizer = make_optimizer(model, settings.optimizer)
    images = case.images().to(settings.device)
    return Trainer(model, optimizer, images, case.forward, settings.amp)


def _build_trainers(
    names: list[str], case: Case, rate: float | None, settings: Settings
) -> dict[str, Trainer]:
    trainers: dict[str, Trainer] = {}
    owner = None
    for name in names:
        trainer = trainers[name] = _build_trainer(case, name, rate, settings)
        if name in OURS:
            owner = owner or trainer
            share_parameters_(trainer.model, owner.model)
            trainer.optimizer = owner.optimizer
    return trainers


def _measure_footprints(
    trainers: dict[str, Trainer], peaks: dict[str, int], case: str
) -> dict[str, Footprint]:
    compact = trainers[COMPACT].model
    footprints, chain = {}, None
    for name, trainer in trainers.items():
        torch.manual_seed(0)  # same dropout
        # TF32 rounding would hide a difference.
        with full_precision():
            saved, output = saved_bytes(trainer.model, trainer.images, trainer.forward)
        if trainer.amp:
            with torch.autocast(trainer.images.device.type):
                saved, _ = saved_bytes(trainer.model, trainer.images, trainer.forward)
        output = [tensor.detach() for tensor in tensors_in(output)]
        difference = None
        # Folded norms in branches use other statistics, so that their outputs differ.
        linear = all(unit.is_linear for unit in named_units(trainer.model).values())
        if name in OURS and linear:
            chain = chain or output
            difference = _difference(output, chain, f'{case}, {name}')
        # Compact-size gradients run units with forward='auto' folded.
        folded = named_units(trainer.model) if name in ('folded', 'auto') else ()
        footprints[name] = Footprint(
            sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            saved,
            reduced_bytes(trainer.model, compact, folded),
            peaks[name],
            difference,
        )
    return footprints


def _difference(output: list[Tensor], chain: list[Tensor], what: str) -> float:
    pairs = list(zip(output, chain, strict=True))
    scale = max(float(b.abs().max()) for _, b in pairs)
    difference = max(float((a - b).abs().max()) for a, b in pairs) / scale
    if not difference <= TOLERANCE:
        raise UserRuntimeError(
            f'{what}: the outputs differ by {difference:.3g} from those of the chain with the '
            f'same factors, allowed {TOLERANCE:g}; this would time a wrong computation'
        )
    return difference


def _result(
    times: list[StepTimes], compact: list[StepTimes], footprint: Footprint
) -> VariantResult:
    step = Seconds.of([sum(t) for t in times])
    base = Seconds.of([sum(t) for t in compact])
    return VariantResult(
        len(times),
        step,
        *(Seconds.of(part) for part in zip(*times, strict=True)),
        ratio=Seconds(step.min / base.min, step.median / base.median),
        footprint=footprint,
    )
