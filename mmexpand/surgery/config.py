"""What a user asks for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..core.blocks import check_method
from ..core.expanded_layer import FORWARDS
from ..core.factorise import INITS
from ..core.names import check_choice, near_matches
from ..core.site import check_rate
from ..errors import UserTypeError, UserValueError


@dataclass(frozen=True)
class ExpandConfig:
    """How to expand a model.

    Args:
        method: 'cl' (1x1, kxk, 1x1), 'ck' (a chain of 3x3), 'fc' (linear layers), 'cl+fc',
            'ck+fc', or 'auto' ('ck' where an odd square kernel > 3 allows it, else 'cl'); other
            linear blocks: 'orepa', 'do', 'ac', 'rep'; blocks with norms in their branches:
            'acnet', 'repvgg', 'dbb', 'qarepvgg', 'repvgg_cl', 'repvgg_ck', 'mobileone', and as
            their control 'bn', one norm behind the layer.
        rate: the expansion rate r > 0 of 'cl', 'ck' and 'fc'; channel counts are rounded, at
            least 1. Of 'mobileone' the number of kxk branches.
        include: which layers: module-name prefixes, globs, or regular expressions ('re:...'); or
            by what they are: 'kernel:3x3' (any size), 'kind:depthwise', 'kind:linear', and
            'kind:residual', inside a block that adds its input (Sec. 4.1 expands the 3x3 of
            MobileNetV2 that are not). None: every layer that the method can expand.
        exclude: which of those not; patterns as in ``include``.
        init: 'default' (the factors' own initialisation, as in the paper) or 'preserve'
            (factors whose product is the present weight).
        forward: 'layerwise' (the paper's chain), 'folded' (one convolution with the product),
            or 'auto' (the cheaper, per layer, input size and device). Blocks with norms in their
            branches are run branch by branch, or folded by statistics of a part of the pixels.
        shortcut: whether 'cl' or 'ck' has a per-channel identity beside it.
        nonlinear: 'relu' between the factors of 'cl', 'ck' and 'fc': a network to start the
            linear one from, by its checkpoint (Sec. 5.3). It is run layer by layer, and can't be
            contracted.

    Raises:
        TypeError, ValueError: for a value that means nothing; the message names the key.
    """

    method: str = 'cl'
    rate: float = 4
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    init: str = 'default'
    forward: str = 'auto'
    shortcut: bool = False
    nonlinear: str | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> 'ExpandConfig':
        """Those of a hook or a builder.

        Raises:
            TypeError, ValueError: as above; for an unknown option, with near matches.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise UserTypeError(
                    f'there is no option {name!r} of ExpandHook and the builders; '
                    + near_matches(name, known)
                )
        return cls(**options)

    def __post_init__(self):
        check_method(self.method, self.shortcut, self.nonlinear)
        check_rate(self.rate)
        check_choice('init', self.init, INITS)
        check_choice('forward', self.forward, FORWARDS)
        if self.nonlinear and (self.init, self.forward) not in (
            ('default', 'auto'),
            ('default', 'layerwise'),
        ):
            raise UserValueError(
                f'nonlinear={self.nonlinear!r} has no kernel to preserve or to fold: leave out '
                f'init={self.init!r} and forward={self.forward!r}'
            )
        for key in ('include', 'exclude'):
            object.__setattr__(self, key, _as_patterns(key, getattr(self, key)))


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
                    f'{key}={pattern!r} is no regular expression: {error}'
                ) from None
    return tuple(patterns)
