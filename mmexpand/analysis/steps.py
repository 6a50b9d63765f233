"""Training steps of several models, timed in turns in one process."""

import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.names import check_choice
from ..errors import UserValueError
from .footprint import tensors_in

OPTIMIZERS = {
    'fused': dict(fused=True),
    'foreach': dict(foreach=True),
    'for-loop': dict(foreach=False),
}
"""Implementations of the optimizer's step, as arguments of ``torch.optim.SGD``."""

MIN_STEPS = 3
"""Least number of timed steps of a model."""

Progress = Callable[[str, int, int], None]
"""Called with the name of the work, the steps done and the steps to do."""


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    Attributes:
        steps: training steps of every model.
        warmup: untimed steps of every model before.
        budget: seconds for the steps of a model; a slow model does fewer steps, but at
            least ``MIN_STEPS``.
        threads: as in ``torch.set_num_threads``.
        optimizer: a key of ``OPTIMIZERS``, the same for all models.
        device: the device of models and images.
        amp: whether forwards run in mixed precision, the loss scaled as ``AmpOptimWrapper`` does.

    Raises:
        ValueError: for a value out of range; the message names it.
    """

    steps: int = 30
    warmup: int = 3
    budget: float = 60
    threads: int = field(default_factory=torch.get_num_threads)
    optimizer: str = 'fused'
    device: str = 'cpu'
    amp: bool = False

    def __post_init__(self):
        for name, least in (('steps', MIN_STEPS), ('warmup', 1), ('budget', 0), ('threads', 1)):
            if getattr(self, name) < least:
                raise UserValueError(f'{name} must be at least {least}, got {getattr(self, name)}')
        check_choice('optimizer', self.optimizer, OPTIMIZERS)


class StepTimes(NamedTuple):
    """Seconds of the parts of one training step."""

    forward: float
    backward: float
    optimizer: float


def make_optimizer(model: nn.Module, implementation: str) -> torch.optim.SGD:
    """Return SGD with momentum 0.9 and weight decay 0.0005, as in the paper.

    Args:
        model: a model, whose frozen parameters are left out.
        implementation: a key of ``OPTIMIZERS``.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    how = OPTIMIZERS[implementation]
    # Small, so that random data does not make the weights diverge.
    return torch.optim.SGD(trained, lr=1e-4, momentum=0.9, weight_decay=5e-4, **how)


def mean_square_loss(output: Any) -> Tensor:
    """Return the sum of mean squares of all output tensors, which costs almost nothing."""
    return sum(tensor.square().mean() for tensor in tensors_in(output))


def clock(device: str | torch.device) -> float:
    """Return seconds after a device has finished its work."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass
class Trainer:
    """A model with its optimizer and input, all on one device."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    forward: Callable[[nn.Module, Tensor], Any]
    amp: bool = False

    def __post_init__(self):
        self._device = self.images.device
        on_gpu = self._device.type == 'cuda'
        # On a CPU mixed precision is bfloat16, which needs no scaling.
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self.amp and on_gpu)

    def step(self) -> StepTimes:
        """Run one training step: the loss counts as forward, freeing gradients as optimizer."""
        start = clock(self._device)
        with torch.autocast(self._device.type, enabled=self.amp):
            loss = mean_square_loss(self.forward(self.model, self.images))
        forward = clock(self._device)
        self._scaler.scale(loss).backward()
        backward = clock(self._device)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad()
        end = clock(self._device)
        return StepTimes(forward - start, backward - forward, end - backward)


def time_in_turns(
    steps: dict[str, Callable[[], StepTimes]], settings: Settings, progress: Progress
) -> dict[str, list[StepTimes]]:
    """Time the steps of several models in turns, so that changes of load affect all.

    In each round each model does one step, in a new random order, since the step before affects
    caches. A slow model skips rounds at even distances. ``progress`` is called before every step.
    """
    times: dict[str, list[StepTimes]] = {name: [] for name in steps}
    with _no_collection():
        counts = {name: _warm_up(step, settings) for name, step in steps.items()}
        order, total = random.Random(0), sum(counts.values())
        for turn in range(settings.steps):
            due = [name for name, count in counts.items() if _is_due(turn, count, settings.steps)]
            order.shuffle(due)
            for name in due:
                progress(f'step of {name}', sum(map(len, times.values())), total)
                times[name].append(steps[name]())
            gc.collect()
    return times


def _warm_up(step: Callable[[], StepTimes], settings: Settings) -> int:
    """Run the warm-up steps, and return the number of steps within the budget."""
    for done in range(1, settings.warmup + 1):
        last = sum(step())
        if done * last > settings.budget / MIN_STEPS:
            break
    return max(MIN_STEPS, min(settings.steps, int(settings.budget / last)))


def _is_due(turn: int, count: int, turns: int) -> bool:
    return (turn + 1) * count // turns > turn * count // turns


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable Python's garbage collector, which could run in any step."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
