"""Names that a user writes: those that there are not are refused, with those that there are."""

import difflib
from collections.abc import Iterable, Sequence

from ..errors import UserValueError


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of those there are.

    Args:
        key: the name of the option, for the message.
        value: what it was given.
        choices: what it can be.

    Raises:
        ValueError: naming the choices.
    """
    if value not in choices:
        raise UserValueError(f'{key} must be one of {", ".join(map(repr, choices))}, got {value!r}')


def near_matches(name: str, known: Iterable[str], otherwise: str = 'there are') -> str:
    """Words of a message on a name that is not known.

    Args:
        name: what was written.
        known: the names that there are.
        otherwise: what the first five of them are called where none is near; '': not shown.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f'near matches: {", ".join(near)}'
    return f'{otherwise} {", ".join(known[:5])}' if otherwise else 'no name is near'
