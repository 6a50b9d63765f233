"""Blocks: formulas that replace a layer while it trains.

A block is a function from a ``LayerSpec`` to an expression (``core/expression``), and a function
that returns why a layer is unfit. ``register_block`` adds a block.
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
    """A block's builder, and the layers and options that it supports.

    Attributes:
        build: builds the expression for a layer. ``build_expression`` adds ``shortcut``, ``norm``
            and ``nonlinear``.
        refusal: returns the reason why a layer is unfit, or ''.
        chain: whether it is a ``Chain`` of factors, as ``shortcut`` and ``nonlinear`` require.
        normed: whether it has norms already, so that ``norm`` is unsupported.
        main: whether it supports ``main``: the kxk branch is built as a chain.
    """

    build: Callable[[LayerSpec], nn.Module]
    refusal: Callable[[LayerSpec], str]
    chain: bool = False
    normed: bool = False
    main: bool = False


BLOCKS: dict[str, Block] = {}
"""Blocks by name; see ``register_block``."""

STRATEGIES = ('cl', 'ck', 'fc', 'auto', 'cl+fc', 'ck+fc')
"""Methods of the paper; each chooses the block that fits a layer."""


def fits_everywhere(spec: LayerSpec) -> str:
    """Return '': the block fits every layer."""
    return ''


TAKEN = {
    *('bias', 'dilation', 'expression', 'factors', 'fold', 'folded', 'folded_parameter', 'given'),
    *('groups', 'in_channels', 'kernel', 'kernel_size', 'like', 'method', 'out_channels'),
    *('padding', 'padding_mode', 'rate', 'spec', 'stride', 'transposed', 'weight'),
}
"""The attributes of units that a block's name would replace."""


def register_block(
    name: str,
    build: Callable[[LayerSpec], nn.Module],
    refusal: Callable[[LayerSpec], str] = fits_everywhere,
    chain: bool = False,
    normed: bool = False,
) -> None:
    """Register a block, so that ``method=name`` expands layers with it.

    Name the module that calls this function in ``custom_imports`` of a config, behind ``mmexpand``.

    Args:
        name: the method; an identifier, which checkpoints contain.
        build: builds the expression (``core/expression``) for a layer. Its factors come from
            ``spec.factor`` and ``spec.conv``.
        refusal: returns the reason why a layer is unfit, or ''.
        chain: whether the expression is a ``Chain`` of factors, which supports ``shortcut`` and
            ``nonlinear``.
        normed: whether the expression has norms, so that ``norm`` is unsupported.

    Raises:
        ValueError: if the name is taken, or cannot be the name of a submodule.
    """
    if name in (*BLOCKS, *STRATEGIES):
        raise UserValueError(f'block {name!r} is registered already; choose another name')
    if not name.isidentifier() or name in {*dir(nn.Module), *vars(nn.Module()), *TAKEN}:
        raise UserValueError(
            f'block name {name!r} cannot be the name of a submodule of a unit; choose another name'
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
    """Return the values of ``method``. Only 'fc' expands linear layers."""
    return [*STRATEGIES, *(name for name in BLOCKS if name not in STRATEGIES)]


def check_method(method: str, options: BlockOptions) -> None:
    """Raise ValueError for an unknown method, and for an option that it does not support."""
    check_choice('method', method, methods())
    strategy = method.removesuffix('+fc')
    block = BLOCKS['cl' if strategy == 'auto' else strategy]
    if options.nonlinear and (options.shortcut or options.norm or not block.chain):
        others = [f'{key}=True' for key in ('shortcut', 'norm') if getattr(options, key)]
        raise UserValueError(
            "nonlinear='relu' is supported between the factors of 'cl', 'ck' and 'fc', not with "
            f'{(others or [f"method={method!r}"])[0]}; remove one of the two'
        )
    if options.shortcut and (strategy == 'fc' or not block.chain):
        raise UserValueError(f"shortcut=True requires method 'cl', 'ck' or 'auto', got {method!r}")
    if options.norm and (strategy == 'fc' or block.normed):
        has = 'expands linear layers' if strategy == 'fc' else 'has norms of its own'
        raise UserValueError(
            f'norm=True requires a linear block of convolutions, but {method!r} {has}; '
            'remove norm=True'
        )
    if options.main and not block.main:
        raise UserValueError(f"main={options.main!r} requires method 'repvgg', got {method!r}")


def choose_block(method: str, spec: LayerSpec) -> tuple[str, LayerSpec]:
    """Return the block, a key of ``BLOCKS``, that a method chooses for a layer.

    Args:
        method: a method.
        spec: the layer spec, with the options that the user chose.

    Returns:
        The block, and the spec with the options that apply: for a linear layer only ``nonlinear``.

    Raises:
        ValueError: if no block of the method fits the layer, with the reason.
    """
    options = spec.options
    check_method(method, options)
    if options.nonlinear and spec.upsampling:
        raise UserValueError(
            f'nonlinear={options.nonlinear!r} is unsupported for transposed convolutions; '
            'exclude the layer'
        )
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
            f"'ck' requires an odd square kernel larger than 3x3, but {_ck.refusal(spec)}; "
            "use 'cl', or 'auto' to use 'ck' only where it fits"
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
    """Return the expression of the block ``name`` for a layer, with the options of its spec."""
    if name not in BLOCKS:
        raise UserValueError(
            f'block {name!r} is not registered; import the module that calls register_block'
        )
    block, options = BLOCKS[name], spec.options

    def build(spec: LayerSpec) -> nn.Module:
        expression = block.build(spec)
        return with_shortcut(expression, spec) if options.shortcut else expression

    if options.nonlinear:
        chain = block.build(spec)
        return NonlinearChain(list(chain), chain.groups)
    return normed.behind_norm(build, spec) if options.norm else build(spec)
