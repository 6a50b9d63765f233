"""Builders that expand a model in the ``model`` part of a config."""

import copy
from functools import partial

from mmengine.registry import MODELS
from torch import nn

from ..surgery import ExpandConfig
from ..surgery.config import takes_options
from .hooks import expand_built


@takes_options
def ExpandModel(model: dict, data_preprocessor: dict | None = None, **options: object) -> nn.Module:
    """Build a model and expand it.

    The result has the model's own class and no prefix in its state-dict keys. Patterns are
    relative to the model.

    Args:
        model: any model config.
        data_preprocessor: the top-level entry of a config, which mmengine's Runner adds.
        **options: see ``ExpandConfig``.

    Raises:
        TypeError, ValueError: see ``ExpandConfig`` and ``plan``.
    """
    cfg = ExpandConfig.of(options)
    if data_preprocessor is not None:
        model = {'data_preprocessor': data_preprocessor, **model}
    # A copy, since some constructors write to their config.
    again = partial(MODELS.build, copy.deepcopy(model))
    built = MODELS.build(model)
    expand_built(built, cfg, again)
    return built


@takes_options
def ExpandBackbone(backbone: dict, **options: object) -> nn.Module:
    """Build a backbone and expand it, with patterns relative to the backbone.

    Args:
        backbone: any backbone config.
        **options: see ``ExpandConfig``.

    Raises:
        TypeError, ValueError: see ``ExpandConfig`` and ``plan``.
    """
    return ExpandModel(backbone, **options)
