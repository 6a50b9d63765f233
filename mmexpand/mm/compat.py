"""Access to private parts of mmengine, each with its version; tests fail when one changes."""

import ast
import traceback
from collections.abc import Callable
from pathlib import Path
from types import MethodType, TracebackType
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import Registry
from mmengine.runner import BaseLoop, Runner
from mmengine.utils import get_installed_path
from torch import nn


def resumes(runner: Runner) -> bool:
    """Return whether a Runner resumes (mmengine 0.10.7)."""
    return bool(runner._resume)


def load_path(runner: Runner) -> str | None:
    """Return the checkpoint that a Runner loads (mmengine 0.10.7)."""
    return runner._load_from


def set_load_path(runner: Runner, path: str) -> None:
    """Set the checkpoint that a Runner loads (mmengine 0.10.7)."""
    runner._load_from = path


def load_again(runner: Runner) -> None:
    """Make a Runner load its checkpoint again (mmengine 0.10.7)."""
    runner._has_loaded = False


def is_training(runner: Runner) -> bool:
    """Return whether a Runner has built its train loop, as only train() does (mmengine 0.10.7)."""
    return isinstance(runner._train_loop, BaseLoop)


def has_val_loop(runner: Runner) -> bool:
    """Return whether a Runner has a val loop or its config (mmengine 0.10.7)."""
    return runner._val_loop is not None


def set_hooks(runner: Runner, hooks: list[Hook]) -> None:
    """Replace a Runner's list of hooks (mmengine 0.10.7)."""
    runner._hooks = hooks


def raw(cfg: Config) -> ConfigDict:
    """Return the dictionary in a config (mmengine 0.10.7)."""
    return cfg._cfg_dict


def is_pure_python(path: str) -> bool:
    """Return whether a config file inherits by ``read_base`` (mmengine 0.10.7)."""
    return Config._is_lazy_import(path)


def base_files(path: str) -> list[str]:
    """Return the paths of the files that a config file inherits from (mmengine 0.10.7)."""
    if is_pure_python(path):
        modules = Config._get_base_modules(ast.parse(Path(path).read_text()).body)
        return [_module_file(module, path) for module in modules]
    return [Config._get_cfg_path(base, path)[0] for base in Config._get_base_files(path)]


def _module_file(module: str, path: str) -> str:
    """Return the file of a module such as '..base' that a config file inherits from."""
    name = module.lstrip('.')
    level = len(module) - len(name)
    if level:
        folder = Path(path).absolute().parents[level - 1]
    else:
        package, _, name = name.partition('.')
        folder = Path(get_installed_path(package))
    return str(folder.joinpath(*name.split('.')).with_suffix('.py'))


def run_forward(model: nn.Module, data: Any, mode: str) -> Any:
    """Run a model as its ``train_step`` and ``val_step`` do (mmengine 0.10.7)."""
    return model._run_forward(data, mode=mode)


def clips_as_mmengine(wrapper: OptimWrapper) -> bool:
    """Return whether a wrapper's class clips gradients as OptimWrapper does (mmengine 0.10.7)."""
    return type(wrapper)._clip_grad is OptimWrapper._clip_grad


def set_clip(wrapper: OptimWrapper, clip: Callable[[OptimWrapper], None]) -> None:
    """Set the function with which a wrapper clips gradients (mmengine 0.10.7)."""
    wrapper._clip_grad = MethodType(clip, wrapper)


def being_built(entry: TracebackType | None) -> tuple[Any, dict, Registry] | None:
    """Return the type, arguments and registry of the innermost object that was being built.

    They are local variables of ``build_from_cfg`` (mmengine 0.10.7).
    """
    found = None
    for frame, _ in traceback.walk_tb(entry):
        if frame.f_code.co_name == 'build_from_cfg':
            seen = frame.f_locals
            kind = seen.get('obj_cls') or seen.get('obj_type')
            found = kind, dict(seen.get('args') or {}), seen.get('registry')
    return found
