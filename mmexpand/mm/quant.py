"""Quantisation-aware training on the kernels that are deployed."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.names import check_choice
from ..errors import UserValueError
from ..surgery import named_units
from ..surgery.fake_quantisation import INT8_KEY, TARGETS, FakeQuantisation
from .checkpoints import unwrap
from .compat import resumes
from .logs import log
from .ranks import broadcast_state


class QuantHook(Hook):
    """A hook that trains with the rounding of the int8 file of ``tools/export_onnx.py``.

    Folded and plain kernels of convolutions and their activations are fake-quantised. The first
    iteration runs the float network to find the norms that the file merges and the initial ranges.
    Norms in branches and merged norms keep the statistics that they had before it. Checkpoints and
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
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._quantises = False
        self._resumed: Mapping | None = None

    def meta(self) -> dict[str, Any]:
        """Return the entry of a checkpoint's ``meta`` with the ranges; empty before they exist."""
        if not self._quantises:
            # A run that is resumed after its last iteration keeps the checkpoint's.
            return {INT8_KEY: self._resumed} if self._resumed else {}
        return {INT8_KEY: dict(target=self.target, ranges=self._quantisation.ranges())}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the ranges of a resumed checkpoint, to continue from them."""
        if resumes(runner):
            self._resumed = checkpoint.get('meta', {}).get(INT8_KEY)

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
            # Norms are found in this iteration, not trained: a resumed run has them frozen already.
            norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
            buffers = (buffer for norm in norms for buffer in norm.buffers())
            self._statistics = [(buffer, buffer.clone()) for buffer in buffers]
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
            for buffer, before in self._statistics:
                buffer.copy_(before)
            self._statistics.clear()
            model = unwrap(runner.model)
            broadcast_state(model)  # Each rank has statistics of its own batches.
            for unit in named_units(model).values():
                unit.forget_products()
            self._warn_of_fresh_norms()
            fake.start(self._resumed and self._resumed['ranges'])
            self._quantises = True
            log(
                f'QuantHook: {len(fake.layers)} convolutions are trained for int8 on '
                f'{self.target} from iteration {runner.iter + 1} on'
            )

    def after_train(self, runner: Runner) -> None:
        """Restore the float network."""
        if self._quantisation is not None:
            self._quantisation.remove()
        elif not self._resumed:
            log(
                f'QuantHook has not started: start={self.start:g} of {runner.max_iters} iterations '
                'was not reached, so that the network is not trained for int8',
                logging.WARNING,
            )

    def _warn_of_fresh_norms(self) -> None:
        norms = [norm for layer in self._quantisation.layers.values() for norm in layer.norms]
        seen = [norm.num_batches_tracked for norm in norms]
        if any(count is not None and count < 2 for count in seen):
            log(
                'QuantHook keeps statistics of norms that have seen at most one batch; start it '
                'from a trained network (load_from), or later (start)',
                logging.WARNING,
            )

    def _observes(self, runner: Runner) -> bool:
        return not self._quantises or runner.iter < self.freeze * runner.max_iters
