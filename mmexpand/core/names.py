"""Checks of names that a user writes: unknown names are rejected, and valid names are listed."""

import difflib
from collections.abc import Collection, Iterable

from ..errors import UserValueError


def check_choice(key: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError if a value is not one of the choices, and list them.

    Args:
        key: the name of the option, for the message.
        value: the value to check.
        choices: the valid values.
    """
    if value not in choices:
        raise UserValueError(f'{key} must be one of {", ".join(map(repr, choices))}, got {value!r}')


def near_matches(name: str, known: Iterable[str], otherwise: str = 'known names:') -> str:
    """Return the part of a message that lists near matches of an unknown name.

    Args:
        name: the unknown name.
        known: the known names.
        otherwise: words before the first five known names if no name is near; '': none is listed.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f'near matches: {", ".join(near)}'
    return f'{otherwise} {", ".join(known[:5])}' if otherwise else 'no near matches'
