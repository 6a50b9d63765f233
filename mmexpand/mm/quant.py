"""Quantisation-aware training on the kernels that are deployed."""

from collections.abc import Mapping
from typing import Any

from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from ..core.names import check_choice
from ..errors import UserValueError
from ..surgery import named_units
from ..surgery.fake_quantisation import INT8_KEY, TARGETS, FakeQuantisation
from .checkpoints import unwrap
from .logs import log


class QuantHook(Hook):
    """Trains with the rounding of the int8 file that ``tools/export_onnx.py`` writes.

    Folded and plain kernels of convolutions and their activations are fake-quantised. One
    iteration of the float network comes first: it finds the norms that the file merges and the
    ranges to start from. Norms in branches and merged norms keep their statistics from then on.
    Checkpoints and the compact files of ContractHook hold the trained ranges in ``meta``.

    Args:
        start: fraction of the iterations after which it begins. Default: 0.
        freeze: fraction of the iterations after which ranges stay as they are. Default: 0.8.
        target: processor that will run the file: 'x86', 'x86-vnni' or 'arm'. Default: 'x86'.

    Raises:
        ValueError: if the fractions are not in order, or the target is unknown.
    """

    # Behind all that changes weights, in front of ContractHook.
    priority = 'VERY_LOW'

    def __init__(self, start: float = 0.0, freeze: float = 0.8, target: str = 'x86'):
        if not 0 <= start <= freeze <= 1:
            raise UserValueError(
                f'QuantHook(start={start!r}, freeze={freeze!r}): these are fractions of the '
                'training, 0 <= start <= freeze <= 1'
            )
        check_choice('target', target, [*TARGETS])
        self.start, self.freeze, self.target = start, freeze, target
        self._quantisation: FakeQuantisation | None = None
        self._quantises = False
        self._given: Mapping | None = None

    def meta(self) -> dict[str, Any]:
        """Return what a checkpoint's ``meta`` says of the ranges; nothing before they exist."""
        if not self._quantises:
            return {}
        return {INT8_KEY: dict(target=self.target, ranges=self._quantisation.ranges())}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Go on from the ranges of a checkpoint that was trained so."""
        self._given = checkpoint.get('meta', {}).get(INT8_KEY, {}).get('ranges')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Save the ranges."""
        checkpoint['meta'].update(self.meta())

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Begin once the time has come; observe activations until they are frozen."""
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
        """Let the ranges follow; quantise from the second iteration on."""
        fake = self._quantisation
        if fake is None:
            return
        if self._observes(runner):
            fake.step(_maximum)
        fake.observe(False)
        if not self._quantises:
            fake.start(self._given)
            self._quantises = True
            log(
                f'QuantHook: {len(fake.layers)} convolutions are trained for int8 on '
                f'{self.target} from iteration {runner.iter + 1} on'
            )

    def after_train(self, runner: Runner) -> None:
        """Leave the float network."""
        if self._quantisation is not None:
            self._quantisation.remove()

    def _observes(self, runner: Runner) -> bool:
        return not self._quantises or runner.iter < self.freeze * runner.max_iters


def _maximum(values: Tensor) -> None:
    all_reduce(values, 'max')
