"""Hooks for the first training steps, in which faults would otherwise go unnoticed."""

from mmengine.runner import Runner

from .checkpoints import put_in_front
from .mean_teacher import TeacherAnchorHook, averages_student
from .norm_check import NormCheckHook
from .optimizer_check import OptimizerCheckHook
from .start import StartHook


def watch_first_steps(runner: Runner) -> None:
    """Add the hooks for the first training steps to a Runner, unless it has them."""
    if any(isinstance(hook, OptimizerCheckHook) for hook in runner.hooks):
        return
    for check in (NormCheckHook(), OptimizerCheckHook()):
        runner.register_hook(check, priority='LOWEST')
    # Before DistillHook, whose hooks on the model would be copied with it.
    put_in_front(runner, StartHook())
    if averages_student(runner):
        put_in_front(runner, TeacherAnchorHook())
