"""Packages that mmexpand works with, and their versions."""

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from .errors import UserImportError

OLDEST = {
    ('torch',): '2.5',
    ('mmengine', 'onedl-mmengine'): '0.10.4',
    ('mmcv', 'mmcv-lite', 'onedl-mmcv'): '2.0.1',
    ('mmdet', 'onedl-mmdetection'): '3.3.0',
    ('mmsegmentation', 'onedl-mmsegmentation'): '1.2.2',
    ('mmpretrain',): '1.2.0',
}
"""The oldest supported version, by the packages that provide a module."""

TOO_NEW = {'mmcv': ('2.2.0', ('mmdet', 'mmsegmentation'))}
"""The first version that other packages refuse, and these packages."""


def check_stack() -> None:
    """Check the versions of the installed packages, without changing any.

    Raises:
        ImportError: if a version cannot work; the message names the package and the fix.
    """
    for names, oldest in OLDEST.items():
        found = {name: installed for name in names if (installed := installed_version(name))}
        if len(found) > 1:
            raise UserImportError(
                f'{" and ".join(found)} are both installed and overwrite each other: uninstall '
                'both, then install one'
            )
        for name, installed in found.items():
            if _numbers(installed) < _numbers(oldest):
                raise UserImportError(
                    f'mmexpand requires {name} {oldest} or newer, but {installed} is installed: '
                    f"pip install -U '{name}>={oldest}'"
                )
    for name, (refused, others) in TOO_NEW.items():
        installed = installed_version(name)
        refusing = [other for other in others if installed_version(other)]
        if installed and refusing and _numbers(installed) >= _numbers(refused):
            raise UserImportError(
                f'{name} {installed} is unsupported by {" and ".join(refusing)}: '
                f"pip install --no-build-isolation '{name}<{refused}'"
            )


def check_installed(what: str, *modules: str) -> None:
    """Check that packages are installed.

    Args:
        what: the feature that requires them.
        *modules: names under which they are imported and installed.

    Raises:
        ImportError: if a package is missing; the message names it.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise UserImportError(
            f'{what} requires {" and ".join(missing)}: pip install {" ".join(missing)}'
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r'\d+', text)[:3])


def installed_version(name: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
