"""Blocks: what stands for a layer while training, one formula each.

A block is a function from the place of a layer (``Site``) to an expression of linear parts
(``core/expression.py``), and says which places it does not fit. ``register_block`` adds one.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ...errors import UserTypeError, UserValueError
from ..names import check_choice
from ..site import Site
from . import ck as _ck
from . import cl as _cl
from . import do as _do
from . import normed, orepa, rep, shortcut
from .nonlinear import with_relu


@dataclass(frozen=True)
class Block:
    """A block: how it is built, and where it cannot be.

    Attributes:
        build: makes the expression for a place.
        refusal: says why a place is not fit for it, or ''.
    """

    build: Callable[[Site], nn.Module]
    refusal: Callable[[Site], str]


BLOCKS: dict[str, Block] = {}
"""Blocks by name; see ``register_block``."""

STRATEGIES = ('cl', 'ck', 'fc', 'auto', 'cl+fc', 'ck+fc')
"""Methods of the paper; each takes the block that suits a layer."""

VARIANTS = ('_shortcut', '_relu')
"""Endings of blocks that ``shortcut`` and ``nonlinear`` choose, which are no methods."""


def fits_everywhere(site: Site) -> str:
    """Return no reason: every layer can be expanded."""
    return ''


def register_block(
    name: str,
    build: Callable[[Site], nn.Module],
    refusal: Callable[[Site], str] = fits_everywhere,
) -> None:
    """Make a block known: ``method=name`` then expands layers by it.

    A module that calls this is named in ``custom_imports`` of a config, behind ``mmexpand``.

    Args:
        name: the method; an identifier. Checkpoints refer to the block by it.
        build: makes the expression (``core/expression``) for a place.
        refusal: returns the reason why a place is unfit, or ''.

    Raises:
        ValueError: if the name is taken, or cannot be the name of a submodule.
    """
    if name in BLOCKS or name in STRATEGIES:
        raise UserValueError(f'block {name!r} is registered already; choose another name')
    taken = {*dir(nn.Module), *vars(nn.Module()), 'factors', 'weight', 'bias', 'kernel', 'leaf'}
    if not name.isidentifier() or name in taken:
        raise UserValueError(
            f'block name {name!r} cannot be the name of a submodule; use an identifier that '
            'nn.Module does not use'
        )
    BLOCKS[name] = Block(build, refusal)


def methods() -> list[str]:
    """Return the values of ``method``. Linear layers are expanded by 'fc' alone."""
    others = [name for name in BLOCKS if not name.endswith(VARIANTS) and name not in STRATEGIES]
    return [*STRATEGIES, *others]


for _name, _build, _refusal in (
    ('cl', _cl.cl, _cl.refusal),
    ('ck', _ck.ck, _ck.refusal),
    ('fc', _cl.cl, _cl.refusal),
    ('cl_shortcut', shortcut.with_shortcut(_cl.cl), shortcut.refusal),
    (
        'ck_shortcut',
        shortcut.with_shortcut(_ck.ck),
        lambda site: _ck.refusal(site) or shortcut.refusal(site),
    ),
    ('cl_relu', with_relu(_cl.cl), _cl.refusal),
    ('ck_relu', with_relu(_ck.ck), _ck.refusal),
    ('fc_relu', with_relu(_cl.cl), _cl.refusal),
    ('orepa', orepa.orepa, orepa.refusal),
    ('do', _do.do, _do.refusal),
    ('ac', rep.ac, rep.refusal),
    ('rep', rep.rep, rep.refusal),
    ('acnet', normed.acnet, normed.refusal),
    ('repvgg', normed.repvgg, normed.refusal),
    ('dbb', normed.dbb, normed.refusal),
    ('qarepvgg', normed.qarepvgg, normed.refusal),
    ('repvgg_cl', normed.repvgg_cl, normed.refusal),
    ('repvgg_ck', normed.repvgg_ck, lambda site: _ck.refusal(site) or normed.refusal(site)),
    ('mobileone', normed.mobileone, normed.mobileone_refusal),
    ('bn', normed.bn, _cl.refusal),
):
    BLOCKS[_name] = Block(_build, _refusal)


def check_method(method: str, shortcut: bool, nonlinear: str | None = None) -> None:
    """Refuse a method that there is not.

    Raises:
        TypeError: if ``shortcut`` is no bool.
        ValueError: naming the methods.
    """
    if nonlinear is not None:
        check_choice('nonlinear', nonlinear, ('relu',))
        chains = method.removesuffix('+fc') in ('cl', 'ck', 'auto', 'fc')
        if shortcut or not chains:
            what = 'shortcut=True' if shortcut else f'method={method!r}'
            raise UserValueError(
                f"nonlinear='relu' goes between the factors of 'cl', 'ck' and 'fc', not with {what}"
            )
    check_choice('method', method, methods())
    if not isinstance(shortcut, bool):
        raise UserTypeError(f'shortcut must be True or False, got {shortcut!r}')
    if shortcut and method.removesuffix('+fc') not in ('cl', 'ck', 'auto'):
        raise UserValueError(f"shortcut=True goes with 'cl', 'ck' or 'auto', not with {method!r}")


def choose_block(method: str, shortcut: bool, site: Site, nonlinear: str | None = None) -> str:
    """The name of the block, a key of ``BLOCKS``, that a method means in this place.

    Raises:
        ValueError: if there is none; the message is the reason.
    """
    check_method(method, shortcut, nonlinear)
    if nonlinear and site.upsampling:
        raise UserValueError(f'nonlinear={nonlinear!r} is not for transposed convolutions')
    suffix = f'_{nonlinear}' if nonlinear else '_shortcut' if shortcut else ''
    if site.linear:
        if 'fc' not in method.split('+'):
            raise UserValueError(
                f"method {method!r} expands convolutions only; 'fc', 'cl+fc' or 'ck+fc' expand "
                'linear layers'
            )
        return f'fc_{nonlinear}' if nonlinear else 'fc'
    strategy = method.removesuffix('+fc')
    if strategy == 'auto':
        strategy = 'cl' if _ck.refusal(site) else 'ck'
    if strategy == 'fc':
        raise UserValueError("'fc' expands linear layers only; use 'cl', 'ck', 'auto', or 'cl+fc'")
    if strategy == 'ck' and _ck.refusal(site):
        raise UserValueError(
            f"'ck' needs an odd square kernel larger than 3x3, and {_ck.refusal(site)}; "
            "use 'cl', or 'auto' to take 'ck' only where it fits"
        )
    name = f'{strategy}{suffix}'
    reason = BLOCKS[name].refusal(site)
    if reason:
        with_shortcut = ' with a shortcut' if shortcut else ''
        raise UserValueError(f'{strategy!r}{with_shortcut} does not fit: {reason}')
    return name
