"""Quantisation-aware training on the kernels that are deployed."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..core.names import check_choice
from ..errors import UserValueError
from ..surgery import named_units
from ..surgery.fake_quantisation import INT8_KEY, TARGETS, FakeQuantisation
from .checkpoints import unwrap
from .logs import log


class QuantHook(Hook):
    """A hook that trains with the rounding of the int8 file of ``tools/export_onnx.py``.

    Folded and plain kernels of convolutions and their activations are fake-quantised. The first
    iteration runs the float network to find the norms that the file merges and the initial
    ranges. From then on norms in branches and merged norms keep their statistics. Checkpoints and
    the compact files of ContractHook hold the trained ranges in ``meta``.

    Args:
        start: fraction of the iterations after which the hook starts. Default: 0.
        freeze: fraction of the iterations after which ranges do not change. Default: 0.8.
        target: processor that will run the file: 'x86', 'x86-vnni' or 'arm'. Default: 'x86'.

    Raises:
        ValueError: if the fractions are not in order, or the target is unknown.
    """

    # After hooks that change weights, before ContractHook.
    priority = 'VERY_LOW'

    def __init__(self, start: float = 0.0, freeze: float = 0.8, target: str = 'x86'):
        if not 0 <= start <= freeze <= 1:
            raise UserValueError(
                'start and freeze of QuantHook must be fractions of the training with '
                f'0 <= start <= freeze <= 1, got {start!r} and {freeze!r}'
            )
        check_choice('target', target, TARGETS)
        self.start, self.freeze, self.target = start, freeze, target
        self._quantisation: FakeQuantisation | None = None
        self._quantises = False
        self._given: Mapping | None = None

    def meta(self) -> dict[str, Any]:
        """Return the entry of a checkpoint's ``meta`` with the ranges; empty before they exist."""
        if not self._quantises:
            return {}
        return {INT8_KEY: dict(target=self.target, ranges=self._quantisation.ranges())}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the ranges of a checkpoint of a quantised training, to continue from them."""
        self._given = checkpoint.get('meta', {}).get(INT8_KEY, {}).get('ranges')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Save the ranges."""
        checkpoint['meta'].update(self.meta())

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Start after ``start`` of the iterations; observe activations until ranges freeze."""
        model = unwrap(runner.model)
        if self._quantisation is None:
            if runner.iter < self.start * runner.max_iters:
                return
            for unit in named_units(model).values():
                unit.freeze_norms()
            self._quantisation = FakeQuantisation(model, self.target)
        # A validation has put the norms back into training mode.
        self._quantisation.freeze_norms()
        self._quantisation.observe(self._observes(runner))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None
    ) -> None:
        """Update the ranges; quantise from the second iteration on."""
        fake = self._quantisation
        if fake is None:
            return
        if self._observes(runner):
            fake.step(partial(all_reduce, op='max'))
        fake.observe(False)
        if not self._quantises:
            fake.start(self._given)
            self._quantises = True
            log(
                f'QuantHook: {len(fake.layers)} convolutions are trained for int8 on '
                f'{self.target} from iteration {runner.iter + 1} on'
            )

    def after_train(self, runner: Runner) -> None:
        """Restore the float network."""
        if self._quantisation is not None:
            self._quantisation.remove()

    def _observes(self, runner: Runner) -> bool:
        return not self._quantises or runner.iter < self.freeze * runner.max_iters
