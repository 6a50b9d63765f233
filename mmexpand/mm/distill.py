"""Knowledge transfer: a teacher's losses beside a model's own, while it trains (Sec. 4.1)."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.names import near_matches
from ..errors import UserRuntimeError, UserValueError
from ..surgery.checkpoint import get_state_dict, load_checkpoint
from ..surgery.copying import copy_model
from .checkpoints import DISTILL_LOSSES, is_training, match_checkpoint, unwrap
from .compact_config import make_compact_config
from .compat import run_forward
from .config_file import is_packaged, open_config
from .dry_run import random_state_kept
from .logs import log
from .models import converts_channels
from .rebuild import check_rebuildable, rebuild_optimizer, rewrap


class DistillHook(Hook):
    """Adds a teacher's losses to those of a classifier, segmentor or detector, expanded or not.

    In every training step the teacher sees what the student sees, after augmentation, and each
    loss compares the outputs of one module in both. The teacher is frozen, in eval mode, and held
    by this hook alone: no checkpoint, optimizer, distributed wrapper, averaged copy or compact
    config knows it. What a loss trains itself (a hint's regressor) is in the optimizer and in
    checkpoints, to be resumed, and not in the compact network. One batch is tried before training.

    Args:
        teacher_config: path of the teacher's config, or a name like ``mmseg::unet/...``.
        teacher_ckpt: path of its checkpoint, compact or expanded.
        losses: by the name in the log, which has to contain 'loss': ``type`` ('KDLoss',
            'HintLoss', 'PKTLoss' or any registered loss of two tensors), its options, and the
            module names ``student`` and ``teacher`` of the outputs to compare.

    Raises:
        ValueError, TypeError: for losses that mean nothing.
    """

    # Before ExpandHook: what that builds again is to hold what is trained here.
    priority = 'HIGHEST'

    def __init__(self, teacher_config: str, teacher_ckpt: str, losses: dict[str, dict]):
        self.teacher_config, self.teacher_ckpt = teacher_config, teacher_ckpt
        # A model starts the same with and without a teacher.
        with random_state_kept():
            self.losses = {name: _build_loss(name, cfg) for name, cfg in losses.items()}
        self.places = {name: (cfg['student'], cfg['teacher']) for name, cfg in losses.items()}
        self.teacher: nn.Module | None = None
        self._tried = False
        self._step = ExitStack()

    def before_run(self, runner: Runner) -> None:
        """Build the teacher, and let the optimizer have what the losses train.

        Raises:
            CheckpointError: if the teacher's checkpoint is missing, or of another network.
            ValueError: for a config or module that there is not, images that the teacher does not
                know, and ``compile``.
            RuntimeError: for a Runner that cannot be built again.
        """
        if not is_training(runner):
            return
        check_rebuildable(runner, 'DistillHook needs a Runner, alone or with DDP')
        if runner.cfg.get('compile'):
            raise UserValueError(
                'DistillHook: compile would not see the losses, which are added while training; '
                'remove it from the config'
            )
        student = unwrap(runner.model)
        with random_state_kept():
            self.teacher = _build_teacher(self.teacher_config, self.teacher_ckpt)
        self.teacher.to(next(student.parameters()).device)
        _check_same_images(student, self.teacher)
        for name, (ours, theirs) in self.places.items():
            _check_module(student, ours, f'{name}: student')
            _check_module(self.teacher, theirs, f'{name}: teacher')
        trained = {name: loss for name, loss in self.losses.items() if list(loss.parameters())}
        if trained:
            _add_distill_losses(runner, trained)
        log(f'DistillHook: {", ".join(self.losses)} from {self.teacher_ckpt}')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Add the losses, for this iteration: copies of the model never have them.

        Raises:
            ValueError: before the first step, if a loss cannot be computed, or trains nothing.
        """
        if not self._tried:
            self._try(runner, data_batch)
            self._tried = True
        self._step.enter_context(self._added_to(unwrap(runner.model)))

    def _try(self, runner: Runner, batch: Any) -> None:
        # On a copy: norms and counters of the model are to be left alone.
        student = copy_model(unwrap(runner.model)).train()
        with random_state_kept(), runner.optim_wrapper.optim_context(student):
            data = student.data_preprocessor(copy.deepcopy(batch), True)
            with self._added_to(student):
                run_forward(student, data, 'loss')

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Take them out."""
        self._step.close()

    @contextmanager
    def _added_to(self, student: nn.Module) -> Iterator[None]:
        """In this context the losses that a student returns hold the teacher's."""

        def add(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if kwargs.get('mode') != 'loss':
                return output
            seen = {name: list(outputs) for name, outputs in ours.items()}
            for outputs in ours.values():
                outputs.clear()
            with torch.no_grad(), _outputs(self.teacher, [b for _, b in places]) as theirs:
                self.teacher(*args, **{**kwargs, 'mode': 'tensor'})
            return _joined(output, self._compare(seen, theirs))

        places = list(self.places.values())
        with _outputs(student, [a for a, _ in places]) as ours:
            handle = student.register_forward_hook(add, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

    def _compare(self, ours: dict[str, list], theirs: dict[str, list]) -> dict[str, Tensor]:
        """The losses, of modules that are called several times the mean over calls."""
        found = {}
        for name, (student, teacher) in self.places.items():
            try:
                pairs = _pairs(ours[student], theirs[teacher])
                values = [_in_full(self.losses[name], *pair) for pair in pairs]
            except ValueError as error:
                raise UserValueError(
                    f'DistillHook: {name} cannot compare {student} of the student with {teacher} '
                    f'of the teacher: {error}'
                ) from error
            found[name] = torch.stack(values).mean()
        return found


def _build_loss(name: str, cfg: dict) -> nn.Module:
    if 'loss' not in name:
        raise UserValueError(f"DistillHook: {name!r} would not be minimised; call it 'loss_{name}'")
    missing = {'type', 'student', 'teacher'} - set(cfg)
    if missing:
        raise UserValueError(f'DistillHook: losses[{name!r}] lacks {", ".join(sorted(missing))}')
    return MODELS.build({k: v for k, v in cfg.items() if k not in ('student', 'teacher')})


def _build_teacher(config: str, checkpoint: str) -> nn.Module:
    """A frozen model in eval mode, as stock OpenMMLab builds it."""
    if not is_packaged(config) and not Path(config).is_file():
        raise UserValueError(f'DistillHook: teacher_config={config!r} is no file')
    weights = load_checkpoint(checkpoint)
    cfg = make_compact_config(open_config(config))
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with MODELS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        teacher = registry.build(cfg.model)
    match_checkpoint(teacher, weights)
    teacher.load_state_dict(get_state_dict(weights), strict=False)
    return teacher.eval().requires_grad_(False)


def _check_same_images(student: nn.Module, teacher: nn.Module) -> None:
    ours, theirs = (_normalisation(m.data_preprocessor) for m in (student, teacher))
    for key, value in ours.items():
        if theirs[key] != value:
            raise UserValueError(
                f"DistillHook: the teacher's data_preprocessor has {key}="
                f"{theirs[key]}, the student's {value}, and both see the student's images; take a "
                'teacher that was trained on such images'
            )


def _normalisation(data_preprocessor: nn.Module) -> dict[str, Any]:
    values = {key: _plain(getattr(data_preprocessor, key, None)) for key in ('mean', 'std')}
    return dict(values, channel_conversion=converts_channels(data_preprocessor))


def _plain(value: Any) -> Any:
    return value.flatten().tolist() if isinstance(value, Tensor) else value


def _check_module(model: nn.Module, name: str, key: str) -> None:
    names = [found for found, _ in model.named_modules() if found]
    if name not in names:
        raise UserValueError(
            f'DistillHook: {key}={name!r} is no module of the model; {near_matches(name, names)}'
        )


def _add_distill_losses(runner: Runner, trained: dict[str, nn.Module]) -> None:
    """Register modules with the model, its distributed wrapper and its optimizer."""
    if not isinstance(runner.cfg.get('optim_wrapper'), dict):
        raise UserRuntimeError(
            f'DistillHook: {", ".join(trained)} has parameters to be trained, and the Runner was '
            'given an optimizer that is built already; give it the config of one'
        )
    model = unwrap(runner.model)
    device = next(model.parameters()).device
    if not hasattr(model, DISTILL_LOSSES):
        model.add_module(DISTILL_LOSSES, nn.ModuleDict())
    losses = getattr(model, DISTILL_LOSSES)
    losses.update(trained)
    losses.to(device)
    if isinstance(runner.model, DistributedDataParallel):
        # Of an expanded model the hook that comes next builds it once more.
        rewrap(runner, compact_gradients=False)
    rebuild_optimizer(runner, instead='take losses without a regressor')


@contextmanager
def _outputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, list]]:
    """What modules return in this context, by name, and the version of each output."""
    seen: dict[str, list] = {name: [] for name in names}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[name].append((output, getattr(output, '_version', 0)))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in seen]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _pairs(ours: list, theirs: list) -> list[tuple[Tensor, Tensor]]:
    if not ours or len(ours) != len(theirs):
        raise UserValueError(
            f'in a training step they are called {len(ours)} and {len(theirs)} times; name modules '
            'that correspond'
        )
    for output, version in (*ours, *theirs):
        if not isinstance(output, Tensor):
            raise UserValueError(
                f'one returns a {type(output).__name__}; name a module inside that returns a tensor'
            )
        if output._version != version:
            raise UserValueError(
                'what comes after one of them changes its output in place; name that'
            )
    if not all(output.requires_grad for output, _ in ours):
        raise UserValueError("the student's has no gradient: it is frozen, or runs without one")
    return [(a, b) for (a, _), (b, _) in zip(ours, theirs, strict=True)]


def _in_full(loss: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    """A loss in float32 at least, whatever precision the networks are run in."""
    wide = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        return loss(student.to(wide), teacher.to(wide))


def _joined(output: Any, found: dict[str, Tensor]) -> dict:
    if not isinstance(output, dict):
        raise UserValueError(
            f'DistillHook: the model returns a {type(output).__name__} of losses, not a dict'
        )
    taken = [name for name in found if name in output]
    if taken:
        raise UserValueError(f'DistillHook: {taken[0]} is a loss of the model; choose another name')
    # The sum of all is logged as 'loss', which a classifier's own of this name would hide.
    own = {'loss_student' if name == 'loss' else name: value for name, value in output.items()}
    return {**own, **found}
