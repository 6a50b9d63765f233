"""A layer's part in a plan: its block and factors, or the reason why it is skipped."""

from dataclasses import dataclass

from ..core.expression import Shape
from ..core.options import BlockOptions


@dataclass(frozen=True)
class LayerPlan:
    """A layer to expand.

    Attributes:
        name: name of its module, the first of ``names``.
        names: all names of its module in the model.
        method: the block: 'cl', 'ck', 'fc', 'orepa', ...
        rate: the expansion rate r.
        factor_shapes: kernel shapes ``(out, in / groups, kh, kw)``, in the order in which a chain
            applies them; 1x1 kernels for a linear layer.
        params_before: number of parameters of the layer.
        params_after: number of parameters of its factors.
        init: the start of its block: 'preserve' or 'default', as in ``ExpandConfig``.
        options: options of the block.
    """

    name: str
    names: tuple[str, ...]
    method: str
    rate: float
    factor_shapes: tuple[Shape, ...]
    params_before: int
    params_after: int
    init: str
    options: BlockOptions = BlockOptions()  # noqa: RUF009  (never changed)

    @property
    def label(self) -> str:
        """Return the block and its options: 'cl norm', 'repvgg main=cl'."""
        return self.options.label(self.method)


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that is not expanded, and the reason."""

    name: str
    reason: str
