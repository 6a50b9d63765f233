"""ExpandConfig: the options of an expansion."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from ..core.blocks import check_method
from ..core.factorise import INITS as BLOCK_INITS
from ..core.layer_spec import check_rate
from ..core.names import check_choice, near_matches
from ..core.options import BlockOptions
from ..core.strategies import FORWARDS
from ..errors import UserTypeError, UserValueError

INITS = ('auto', *BLOCK_INITS)


@dataclass(frozen=True)
class ExpandConfig(BlockOptions):
    """The options of an expansion.

    Args:
        method: the block. Linear blocks: 'cl' (1x1, kxk, 1x1), 'ck' (a chain of 3x3), 'fc' (linear
            layers), 'cl+fc', 'ck+fc', 'auto' ('ck' for odd square kernels > 3, else 'cl'),
            'orepa', 'do', 'ac', 'rep'. Blocks with norms in their branches: 'acnet', 'repvgg',
            'dbb', 'qarepvgg', 'mobileone', and their control 'bn', one norm behind the layer.
            Required.
        rate: the expansion rate r > 0 of 'cl', 'ck' and 'fc'; channel counts are rounded, at
            least 1. For 'mobileone' the number of kxk branches. Default: 4.
        include: patterns of layers to expand: module-name prefixes, globs, regular expressions
            ('re:...'), or the kinds 'kernel:3x3' (any size), 'kind:depthwise', 'kind:linear' and
            'kind:residual' (inside a block that adds its input; Sec. 4.1 expands the 3x3 layers
            of MobileNetV2 in other blocks). None: every layer that the method can expand.
            Default: None.
        exclude: patterns of layers to skip, as in ``include``. Default: None.
        init: the start of a block: 'preserve' (from the layer's current weight), 'default' (from
            the block's own initialisation, as in the paper), or 'auto' ('preserve' for given
            weights, 'default' for random weights; a weight is given if building the model again
            gives the same weight; the hook and the builders build again, ``expand_`` cannot and
            preserves all layers). With ``nonlinear``, 'auto' is 'default'. Default: 'auto'.
        forward: 'layerwise' (one factor after another, as in the paper), 'folded' (one
            convolution with the folded kernel), or 'auto' (the cheaper, by layer and input
            size). Blocks with norms in their branches run layerwise with 'auto', or, on a CPU
            where this costs less, folded with statistics of the batch sample. Default: 'auto'.
        shortcut: whether 'cl' or 'ck' has a per-channel identity as a branch. Default: False.
        norm: whether a linear block of a convolution has a batch norm behind its kernel, which
            sets the scale for any start of the block. Default: False.
        main: the chain, 'cl' or 'ck', that replaces the kxk branch of 'repvgg'. Default: None.
        nonlinear: 'relu' between the factors of 'cl', 'ck' and 'fc', for a network whose
            checkpoint starts a linear training (Sec. 5.3). It runs layerwise, and cannot be
            contracted. Default: None.

    Raises:
        TypeError, ValueError: for an unusable value, naming the option.
    """

    method: str | None = None
    rate: float = 4
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    init: str = 'auto'
    forward: str = 'auto'

    @classmethod
    def given(cls, cfg: 'ExpandConfig | None', options: Mapping[str, Any]) -> 'ExpandConfig':
        """Return a config, given either as an object or by options.

        Raises:
            TypeError, ValueError: see ``ExpandConfig``; also for both, or another type of object.
        """
        if cfg is None:
            return cls.of(options)
        if not isinstance(cfg, cls):
            raise UserTypeError(
                f'cfg must be an ExpandConfig, got {cfg!r}; give options by name, as in '
                "method='repvgg'"
            )
        if options:
            raise UserTypeError(
                f'{next(iter(options))} is given in addition to cfg={cfg}; set it in cfg, or give '
                'all options by name'
            )
        return cfg

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> 'ExpandConfig':
        """Return the config with these options.

        Raises:
            TypeError, ValueError: see ``ExpandConfig``; also for an unknown option.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise UserTypeError(
                    f'unknown option {name!r} of ExpandHook, the builders and expand_; '
                    + near_matches(name, known)
                )
        return cls(**options)

    def __post_init__(self):
        super().__post_init__()
        if self.method is None:
            raise UserTypeError(
                "method is required: 'bn' suits networks without batch norms, 'repvgg' networks "
                "with them, and 'cl' is the paper's block (docs/blocks.md)"
            )
        check_method(self.method, self.options)
        check_rate(self.rate)
        check_choice('init', self.init, INITS)
        if self.nonlinear and self.init == 'auto':
            object.__setattr__(self, 'init', 'default')
        check_choice('forward', self.forward, FORWARDS)
        if self.nonlinear and (self.init, self.forward) not in (
            ('default', 'auto'),
            ('default', 'layerwise'),
        ):
            raise UserValueError(
                f'nonlinear={self.nonlinear!r} has no kernel to preserve or to fold: remove '
                f'init={self.init!r} and forward={self.forward!r}'
            )
        for key in ('include', 'exclude'):
            object.__setattr__(self, key, _as_patterns(key, getattr(self, key)))


Taker = TypeVar('Taker', bound=Callable)


def takes_options(taker: Taker) -> Taker:
    """Add the options of ``ExpandConfig`` to the signature and docstring of a function or class.

    Args:
        taker: a function or class with ``**options`` and a line for them in its docstring.
    """
    function = taker.__init__ if isinstance(taker, type) else taker
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        option.replace(kind=option.KEYWORD_ONLY)
        for option in inspect.signature(ExpandConfig).parameters.values()
    ]
    function.__signature__ = signature.replace(parameters=[*own, *options])
    if taker.__doc__:  # python -OO removes docstrings.
        described = re.search(r'(?<=Args:\n).*?(?=\n\n)', ExpandConfig.__doc__, re.DOTALL)[0]
        taker.__doc__ = re.sub(r' {8}\*\*options: .*', lambda _: described, taker.__doc__)
    return taker


def _as_patterns(key: str, value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else value
    valid = isinstance(patterns, Sequence) and patterns
    if not valid or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise UserTypeError(f'{key} must be a pattern or a list of patterns, got {value!r}')
    for pattern in patterns:
        if pattern.startswith('re:'):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise UserValueError(
                    f'{key}={pattern!r} is not a regular expression: {error}'
                ) from None
    return tuple(patterns)
