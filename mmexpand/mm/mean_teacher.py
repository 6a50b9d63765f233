"""Teachers that are averages of a student, of mmdet's MeanTeacherHook."""

from mmengine.runner import Runner

from ..errors import UserValueError
from ..surgery import named_units
from .checkpoints import unwrap

NAME = 'MeanTeacherHook'


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
