"""Options of a block in addition to its method and rate."""

from dataclasses import dataclass, fields
from typing import Any

from ..errors import UserTypeError
from .names import check_choice

MAIN = ('cl', 'ck')
"""Values of ``main``: the chain in the place of the kxk branch of 'repvgg'."""


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """Variants of a block; see ``ExpandConfig``.

    Attributes:
        shortcut: whether a per-channel identity is added to a chain.
        norm: whether a batch norm is behind the kernel of a linear block.
        main: 'cl' or 'ck': the chain in the place of the kxk branch of 'repvgg', or None.
        nonlinear: 'relu' between the factors of a chain, or None.

    Raises:
        TypeError, ValueError: for an invalid value.
    """

    shortcut: bool = False
    norm: bool = False
    main: str | None = None
    nonlinear: str | None = None

    def __post_init__(self):
        for key in ('shortcut', 'norm'):
            if not isinstance(getattr(self, key), bool):
                raise UserTypeError(f'{key} must be True or False, got {getattr(self, key)!r}')
        if self.main is not None:
            check_choice('main', self.main, MAIN)
        if self.nonlinear is not None:
            check_choice('nonlinear', self.nonlinear, ('relu',))

    @property
    def options(self) -> 'BlockOptions':
        """Return the options as a plain ``BlockOptions``, also from a derived class."""
        return BlockOptions(**{field.name: getattr(self, field.name) for field in _FIELDS})

    @property
    def chosen(self) -> dict[str, Any]:
        """Return the options that differ from the default."""
        values = {field.name: getattr(self, field.name) for field in _FIELDS}
        return {key: value for key, value in values.items() if value}

    def label(self, method: str) -> str:
        """Return a block's name and its options: 'cl norm', 'repvgg main=cl'."""
        words = [key if value is True else f'{key}={value}' for key, value in self.chosen.items()]
        return ' '.join([method, *words])

    def encode(self) -> int:
        """Return the options as an integer for a state dict; ``nonlinear`` is not part of it."""
        main = 0 if self.main is None else 1 + MAIN.index(self.main)
        return self.shortcut + 2 * self.norm + 4 * main

    @classmethod
    def decode(cls, code: int) -> 'BlockOptions':
        """Return the options for an integer of ``encode``."""
        main = (None, *MAIN)[code // 4]
        return cls(shortcut=bool(code % 2), norm=bool(code // 2 % 2), main=main)


_FIELDS = fields(BlockOptions)
