"""Teachers that are averages of a student, of mmdet's MeanTeacherHook."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..errors import UserValueError
from ..surgery import named_units
from .checkpoints import unwrap

NAME = 'MeanTeacherHook'


class TeacherAnchorHook(Hook):
    """A hook that copies a student's unit to the teacher when its norms were anchored.

    Anchoring changes the norms but not the function. An average of the norms before and after
    would compute another function.
    """

    def before_train(self, runner: Runner) -> None:
        """Find the units whose norms have no statistics yet."""
        model = unwrap(runner.model)
        teachers = named_units(model.teacher)
        self._waiting = {
            unit: teachers[name]
            for name, unit in named_units(model.student).items()
            if not unit.is_anchored
        }

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Copy the units that this iteration has anchored."""
        for student in [unit for unit in self._waiting if unit.is_anchored]:
            self._waiting.pop(student).load_state_dict(student.state_dict())


def averages_student(runner: Runner) -> bool:
    """Return whether a Runner has a MeanTeacherHook."""
    return any(type(hook).__name__ == NAME for hook in runner.hooks)


def check_mean_teacher(runner: Runner) -> None:
    """Raise ValueError if MeanTeacherHook would average an expanded student wrongly.

    The hook pairs the parameters of ``student`` and ``teacher`` by their order, and by default
    leaves out running statistics.
    """
    hooks = [hook for hook in runner.hooks if type(hook).__name__ == NAME]
    if not hooks:
        return
    model = unwrap(runner.model)
    student, teacher = (
        {name: unit.method for name, unit in named_units(part).items()}
        for part in (model.student, model.teacher)
    )
    if student != teacher:
        other = min(student.items() ^ teacher.items())[0]
        raise UserValueError(
            f'{NAME} averages the student into the teacher, but {other} is expanded in one of them '
            "only: expand both, for example with include=['student', 'teacher']"
        )
    normed = [name for name, unit in named_units(model.student).items() if not unit.is_linear]
    if normed and any(hook.skip_buffers for hook in hooks):
        raise UserValueError(
            f'{NAME} leaves out the running statistics of norms in branches, so that the teacher '
            f'of {normed[0]} would compute another function: set skip_buffer=False of {NAME}, or '
            "use a block without norms, such as method='cl'"
        )
