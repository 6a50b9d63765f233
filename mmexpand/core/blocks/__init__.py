"""Blocks: what stands for a layer while training, one formula each.

A block is a function from a layer's spec (``LayerSpec``) to an expression of linear parts
(``core/expression``), and says which layers it does not fit. ``register_block`` adds one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from ...errors import UserValueError
from ..layer_spec import LayerSpec
from ..names import check_choice
from ..options import BlockOptions
from . import ck as _ck
from . import cl as _cl
from . import do as _do
from . import normed, orepa, rep
from .nonlinear import NonlinearChain
from .shortcut import with_shortcut


@dataclass(frozen=True)
class Block:
    """A block: how it is built, and where it cannot be.

    Attributes:
        build: makes the expression for a layer, without the options that ``build_expression``
            adds to it.
        refusal: says why a layer is unfit for it, or ''.
        chain: whether it is a ``Chain`` of factors, which ``shortcut`` and ``nonlinear`` go with.
        normed: whether it has norms, and takes no other with ``norm``.
        main: whether it builds its kxk branch as ``main`` says.
    """

    build: Callable[[LayerSpec], nn.Module]
    refusal: Callable[[LayerSpec], str]
    chain: bool = False
    normed: bool = False
    main: bool = False


BLOCKS: dict[str, Block] = {}
"""Blocks by name; see ``register_block``."""

STRATEGIES = ('cl', 'ck', 'fc', 'auto', 'cl+fc', 'ck+fc')
"""Methods of the paper; each takes the block that suits a layer."""

ALIASES = {f'repvgg_{main}': ('repvgg', BlockOptions(main=main)) for main in ('cl', 'ck')}
"""Former names of methods, each with the block and options that it means."""


def fits_everywhere(spec: LayerSpec) -> str:
    """Return no reason: every layer can be expanded."""
    return ''


def register_block(
    name: str,
    build: Callable[[LayerSpec], nn.Module],
    refusal: Callable[[LayerSpec], str] = fits_everywhere,
    chain: bool = False,
    normed: bool = False,
) -> None:
    """Make a block known: ``method=name`` then expands layers by it.

    A module that calls this is named in ``custom_imports`` of a config, behind ``mmexpand``.

    Args:
        name: the method; an identifier. Checkpoints refer to the block by it.
        build: makes the expression (``core/expression``) for a layer.
        refusal: returns the reason why a layer is unfit, or ''.
        chain: whether the expression is a ``Chain`` of factors; ``shortcut`` and ``nonlinear`` go
            with it then.
        normed: whether the expression has norms; ``norm`` does not go with it then.

    Raises:
        ValueError: if the name is taken, or cannot be the name of a submodule.
    """
    if name in (*BLOCKS, *STRATEGIES, *ALIASES):
        raise UserValueError(f'block {name!r} is registered already; choose another name')
    own = {'factors', 'weight', 'bias', 'kernel', 'folded_parameter', 'spec', 'method'}
    taken = {*dir(nn.Module), *vars(nn.Module()), *own}
    if not name.isidentifier() or name in taken:
        raise UserValueError(
            f'block name {name!r} cannot be the name of a submodule; use an identifier that '
            'nn.Module does not use'
        )
    BLOCKS[name] = Block(build, refusal, chain, normed)


BLOCKS.update(
    cl=Block(_cl.cl, fits_everywhere, chain=True),
    ck=Block(_ck.ck, _ck.refusal, chain=True),
    fc=Block(_cl.cl, fits_everywhere, chain=True),
    orepa=Block(orepa.orepa, LayerSpec.not_odd),
    do=Block(_do.do, _do.refusal),
    ac=Block(rep.ac, LayerSpec.not_odd),
    rep=Block(rep.rep, LayerSpec.not_odd),
    bn=Block(normed.bn, fits_everywhere, normed=True),
    repvgg=Block(normed.repvgg, LayerSpec.not_odd, normed=True, main=True),
    qarepvgg=Block(normed.qarepvgg, LayerSpec.not_odd, normed=True),
    mobileone=Block(normed.mobileone, normed.mobileone_refusal, normed=True),
    acnet=Block(normed.acnet, LayerSpec.not_odd, normed=True),
    dbb=Block(normed.dbb, LayerSpec.not_odd, normed=True),
)


def methods() -> list[str]:
    """Return the values of ``method``. Linear layers are expanded by 'fc' alone."""
    return [*STRATEGIES, *(name for name in BLOCKS if name not in STRATEGIES)]


def resolve_method(method: str, options: BlockOptions) -> tuple[str, BlockOptions]:
    """Return the method that a name means, and the options together with those that it means.

    Raises:
        ValueError: for an unknown method, which names the methods, and for an option that does not
            go with it.
    """
    given = method
    if method in ALIASES:
        method, implied = ALIASES[method]
        options = replace(options, **implied.chosen)
    else:
        check_choice('method', method, methods())
    strategy = method.removesuffix('+fc')
    block = BLOCKS['cl' if strategy == 'auto' else strategy]
    if options.nonlinear and (options.shortcut or options.norm or not block.chain):
        others = [f'{key}=True' for key in ('shortcut', 'norm') if getattr(options, key)]
        raise UserValueError(
            "nonlinear='relu' goes between the factors of 'cl', 'ck' and 'fc', not with "
            f'{(others or [f"method={given!r}"])[0]}'
        )
    if options.shortcut and (strategy == 'fc' or not block.chain):
        raise UserValueError(f"shortcut=True goes with 'cl', 'ck' or 'auto', not with {given!r}")
    if options.norm and (strategy == 'fc' or block.normed):
        has = 'expands linear layers' if strategy == 'fc' else 'has norms of its own'
        raise UserValueError(
            f'norm=True goes with linear blocks of convolutions, and {given!r} {has}: leave it out'
        )
    if options.main and not block.main:
        raise UserValueError(f"main={options.main!r} goes with 'repvgg', not with {given!r}")
    return method, options


def choose_block(method: str, spec: LayerSpec) -> tuple[str, LayerSpec]:
    """Return the block, a key of ``BLOCKS``, that a method means for a layer.

    Args:
        method: a method or a former name of one.
        spec: of the layer, with the options that were asked for.

    Returns:
        The block, and the spec with the options that the block has: of a linear layer
        ``nonlinear`` alone.

    Raises:
        ValueError: if there is none; the message is the reason.
    """
    method, options = resolve_method(method, spec.options)
    spec = replace(spec, options=options)
    if options.nonlinear and spec.upsampling:
        raise UserValueError(f'nonlinear={options.nonlinear!r} is not for transposed convolutions')
    if spec.linear:
        if 'fc' not in method.split('+'):
            raise UserValueError(
                f"method {method!r} expands convolutions only; 'fc', 'cl+fc' or 'ck+fc' expand "
                'linear layers'
            )
        return 'fc', replace(spec, options=BlockOptions(nonlinear=options.nonlinear))
    name = method.removesuffix('+fc')
    if name == 'auto':
        name = 'cl' if _ck.refusal(spec) else 'ck'
    if name == 'fc':
        raise UserValueError("'fc' expands linear layers only; use 'cl', 'ck', 'auto', or 'cl+fc'")
    if name == 'ck' and _ck.refusal(spec):
        raise UserValueError(
            f"'ck' needs an odd square kernel larger than 3x3, and {_ck.refusal(spec)}; "
            "use 'cl', or 'auto' to take 'ck' only where it fits"
        )
    reason = BLOCKS[name].refusal(spec)
    if not reason and options.shortcut:
        reason = spec.not_odd()
    if not reason and options.main:
        reason = BLOCKS[options.main].refusal(spec)
    if reason:
        raise UserValueError(f'{options.label(name)!r} does not fit: {reason}')
    return name, spec


def build_expression(name: str, spec: LayerSpec) -> nn.Module:
    """Return the expression of a block for a layer, with the options of its spec."""
    block, options = BLOCKS[name], spec.options

    def build(spec: LayerSpec) -> nn.Module:
        expression = block.build(spec)
        return with_shortcut(expression, spec) if options.shortcut else expression

    if options.nonlinear:
        chain = block.build(spec)
        return NonlinearChain(list(chain), chain.groups)
    return normed.behind_norm(build, spec) if options.norm else build(spec)
