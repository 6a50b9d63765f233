"""The packages that mmexpand is used beside: which, and from which version."""

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
"""The oldest version that is supported, by the packages that provide one and the same module."""

TOO_NEW = {'mmcv': ('2.2.0', ('mmdet', 'mmsegmentation'))}
"""The version that others refuse, and all after it; with those others."""


def check_stack() -> None:
    """Refuse what cannot work, in a sentence; nothing is pinned, nothing is replaced.

    Raises:
        ImportError: naming the package, and what to do.
    """
    for names, oldest in OLDEST.items():
        found = {name: installed for name in names if (installed := installed_version(name))}
        if len(found) > 1:
            raise UserImportError(
                f'{" and ".join(found)} are both installed, and overwrite each other: uninstall '
                'both, then install one'
            )
        for name, installed in found.items():
            if _numbers(installed) < _numbers(oldest):
                raise UserImportError(
                    f'mmexpand works with {name} {oldest} or newer, and {installed} is installed: '
                    f"pip install -U '{name}>={oldest}'"
                )
    for name, (refused, others) in TOO_NEW.items():
        installed = installed_version(name)
        refusing = [other for other in others if installed_version(other)]
        if installed and refusing and _numbers(installed) >= _numbers(refused):
            raise UserImportError(
                f'{" and ".join(refusing)} work with {name} before {refused}, and {installed} is '
                f"installed: pip install --no-build-isolation '{name}<{refused}'"
            )


def check_installed(what: str, *modules: str) -> None:
    """Refuse to promise what a package is missing for.

    Args:
        what: needs them.
        *modules: by the name that they are imported and installed by.

    Raises:
        ImportError: naming those that are missing.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise UserImportError(
            f'{what} needs {" and ".join(missing)}: pip install {" ".join(missing)}'
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r'\d+', text)[:3])


def installed_version(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
