"""Knowledge transfer: a teacher's losses in addition to the model's own (Sec. 4.1)."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.compat import tree_map_only, version
from ..core.names import near_matches
from ..errors import UserRuntimeError, UserValueError
from ..surgery.checkpoint import get_state_dict, load_checkpoint
from ..surgery.copying import copy_model
from .checkpoints import DISTILL_LOSSES, match_checkpoint, unwrap
from .compact_config import make_compact_config
from .compat import is_training, run_forward
from .config_file import open_config
from .logs import log
from .models import converts_channels
from .random_state import random_state_kept
from .rebuild import check_rebuildable, rebuild_optimizer, rewrap


class DistillHook(Hook):
    """A hook that adds a teacher's losses to a classifier, segmentor or detector.

    In each training step the teacher gets the student's augmented images, and each loss compares
    the outputs of one module in both networks. The teacher is frozen, in eval mode, and held by
    this hook only: it is not in checkpoints, optimizer, distributed wrapper, averaged copies or
    compact config. Trained parameters of a loss (a hint's regressor) are in the optimizer and in
    checkpoints, but not in the compact network. One batch is tried before training.

    Args:
        teacher_config: path of the teacher's config, or a name like ``mmseg::unet/...``.
        teacher_ckpt: path of its checkpoint, compact or expanded.
        losses: configs of the losses by their name in the log, which must contain 'loss': ``type``
            ('KDLoss', 'HintLoss', 'PKTLoss' or any registered loss of two tensors), its options,
            and the module names ``student`` and ``teacher`` whose outputs are compared.

    Raises:
        ValueError, TypeError: for unusable losses.
    """

    # Before ExpandHook, which builds the optimizer again: it must hold the losses' parameters.
    priority = 'HIGHEST'

    def __init__(self, teacher_config: str, teacher_ckpt: str, losses: dict[str, dict]):
        self.teacher_config, self.teacher_ckpt = teacher_config, teacher_ckpt
        # The model's initial weights must not depend on a teacher.
        with random_state_kept():
            self.losses = {name: _build_loss(name, cfg) for name, cfg in losses.items()}
        self.places = {name: (cfg['student'], cfg['teacher']) for name, cfg in losses.items()}
        self.teacher: nn.Module | None = None
        self._tried = False
        self._step = ExitStack()

    def before_run(self, runner: Runner) -> None:
        """Build the teacher and add the losses' parameters to the optimizer.

        Raises:
            CheckpointError: if the teacher's checkpoint is missing or of another network.
            ValueError: for a missing config or module, a teacher with another normalisation of
                images, and ``compile``.
            RuntimeError: for a Runner that cannot be built again.
        """
        if not is_training(runner):
            return
        check_rebuildable(runner, 'DistillHook requires a Runner without a wrapper or with DDP')
        if runner.cfg.get('compile'):
            raise UserValueError(
                'DistillHook does not support compile, which would miss the losses that it adds '
                'while training; remove compile from the config'
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
        """Add the losses for this iteration only, so that copies of the model never have them.

        Raises:
            ValueError: before the first step, if a loss cannot be computed or has no gradient.
        """
        if not self._tried:
            self._try(runner, data_batch)
            self._tried = True
        self._step.enter_context(self._added_to(unwrap(runner.model)))

    def _try(self, runner: Runner, batch: Any) -> None:
        # The copy keeps the model's norms and counters unchanged.
        student = copy_model(unwrap(runner.model))
        student.train()  # It may return None, as mmdet's LD.
        with random_state_kept(), runner.optim_wrapper.optim_context(student):
            data = student.data_preprocessor(copy.deepcopy(batch), True)
            with self._added_to(student):
                run_forward(student, data, 'loss')

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Remove the teacher's losses from the model."""
        self._step.close()

    @contextmanager
    def _added_to(self, student: nn.Module) -> Iterator[None]:
        """Add the teacher's losses to the student's in this context."""

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
        with (
            _outputs(student, [a for a, _ in places]) as ours,
            student.register_forward_hook(add, with_kwargs=True),
        ):
            yield

    def _compare(self, ours: dict[str, list], theirs: dict[str, list]) -> dict[str, Tensor]:
        """Return the losses, averaged over calls if a module is called several times."""
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
        raise UserValueError(
            f'DistillHook: a loss named {name!r} would not be minimised, since its name lacks '
            f"'loss'; call it 'loss_{name}'"
        )
    missing = {'type', 'student', 'teacher'} - set(cfg)
    if missing:
        raise UserValueError(f'DistillHook: losses[{name!r}] lacks {", ".join(sorted(missing))}')
    return MODELS.build({k: v for k, v in cfg.items() if k not in ('student', 'teacher')})


def _build_teacher(config: str, checkpoint: str) -> nn.Module:
    """Return the teacher's compact model, frozen and in eval mode."""
    weights = load_checkpoint(checkpoint)
    cfg = make_compact_config(open_config(config))
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with MODELS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        teacher = registry.build(cfg.model)
    match_checkpoint(teacher, weights)
    teacher.load_state_dict(get_state_dict(weights), strict=False)
    teacher.eval()
    return teacher.requires_grad_(False)


def _check_same_images(student: nn.Module, teacher: nn.Module) -> None:
    ours, theirs = (_normalisation(m.data_preprocessor) for m in (student, teacher))
    for key, value in ours.items():
        if theirs[key] != value:
            raise UserValueError(
                f"DistillHook: the teacher's data_preprocessor has {key}={theirs[key]}, the "
                f"student's {value}, but both get the student's images; use a teacher that was "
                'trained on such images'
            )


def _normalisation(data_preprocessor: nn.Module) -> dict[str, Any]:
    found = {key: getattr(data_preprocessor, key, None) for key in ('mean', 'std')}
    values = tree_map_only(Tensor, lambda value: value.flatten().tolist(), found)
    return dict(values, channel_conversion=converts_channels(data_preprocessor))


def _check_module(model: nn.Module, name: str, key: str) -> None:
    names = [found for found, _ in model.named_modules() if found]
    if name not in names:
        raise UserValueError(
            f'DistillHook: {key}={name!r} is not a module of the model; {near_matches(name, names)}'
        )


def _add_distill_losses(runner: Runner, trained: dict[str, nn.Module]) -> None:
    """Add losses with parameters to the model, its distributed wrapper and its optimizer."""
    if not isinstance(runner.cfg.get('optim_wrapper'), dict):
        raise UserRuntimeError(
            f'DistillHook cannot add the parameters of {", ".join(trained)} to an optimizer that '
            'the Runner got as an object; give the Runner its config'
        )
    model = unwrap(runner.model)
    device = next(model.parameters()).device
    if not hasattr(model, DISTILL_LOSSES):
        model.add_module(DISTILL_LOSSES, nn.ModuleDict())
    losses = getattr(model, DISTILL_LOSSES)
    losses.update(trained)
    losses.to(device)
    if isinstance(runner.model, DistributedDataParallel):
        # For an expanded model, ExpandHook then builds the wrapper again.
        rewrap(runner, compact_gradients=False)
    rebuild_optimizer(runner, instead='use losses without a regressor')


@contextmanager
def _outputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, list]]:
    """Yield the outputs of modules in this context, by name, each with its version."""
    seen: dict[str, list] = {name: [] for name in names}

    def keep(name: str, _: nn.Module, __: Any, output: Any) -> None:
        before = version(output) if isinstance(output, Tensor) else 0
        seen[name].append((output, before))

    with ExitStack() as hooks:
        for name in seen:
            hook = partial(keep, name)
            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook))
        yield seen


def _pairs(ours: list, theirs: list) -> list[tuple[Tensor, Tensor]]:
    if not ours or len(ours) != len(theirs):
        raise UserValueError(
            f'in a training step the modules are called {len(ours)} and {len(theirs)} times; name '
            'modules that are called equally often'
        )
    for output, before in (*ours, *theirs):
        if not isinstance(output, Tensor):
            raise UserValueError(
                f'a module returns a {type(output).__name__}, not a tensor; name a module inside it'
            )
        if version(output) != before:
            raise UserValueError(
                'the next module changes the output of a compared module in place; name the next '
                'module'
            )
    if not all(output.requires_grad for output, _ in ours):
        raise UserValueError("the student's output has no gradient; name a module that is trained")
    return [(a, b) for (a, _), (b, _) in zip(ours, theirs, strict=True)]


def _in_full(loss: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    """Return a loss computed in float32 or wider, whatever the networks' precision."""
    wide = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        return loss(student.to(wide), teacher.to(wide))


def _joined(output: Any, found: dict[str, Tensor]) -> dict:
    if not isinstance(output, dict):
        raise UserValueError(
            f'DistillHook requires a model that returns a dict of losses, got a '
            f'{type(output).__name__}'
        )
    taken = [name for name in found if name in output]
    if taken:
        raise UserValueError(
            f'DistillHook: the model already has a loss {taken[0]!r}; choose another name'
        )
    # The sum of all losses is logged as 'loss', a name that a classifier's own loss has too.
    own = {'loss_student' if name == 'loss' else name: value for name, value in output.items()}
    return {**own, **found}
