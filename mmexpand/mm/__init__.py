"""OpenMMLab: hooks and builders, registered with mmengine's root registries."""

from importlib.util import find_spec

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.model import BaseAveragedModel
from mmengine.registry import DATASETS, HOOKS, MODELS

from .. import models  # noqa: F401
from ..stack import installed_version
from ..surgery.references import CACHES
from .builders import ExpandBackbone, ExpandModel
from .corrupt_labels import CorruptLabels
from .distill import DistillHook
from .gradient_confusion import GradientConfusionHook
from .hooks import ContractHook, ExpandHook
from .models import refresh_average
from .optim import ExpandOptimWrapperConstructor
from .quant import QuantHook
from .runtime import allow_mmengine_checkpoints

if find_spec('mmcv'):
    from mmcv.cnn.bricks.wrappers import Conv2d, ConvTranspose2d, Linear

    from ..core.eligibility import PLAIN_LAYERS

    # mmcv's layers differ from nn's only for empty batches on old torch versions.
    PLAIN_LAYERS.update((Conv2d, ConvTranspose2d, Linear))

# mmengine looks up ``_base_ = 'mmexpand::...'`` here.
MODULE2PACKAGE.setdefault('mmexpand', 'mmexpand')
if installed_version('onedl-mmsegmentation'):
    # OneDL's mmengine looks for 'mmseg::...' in the package with the upstream name.
    MODULE2PACKAGE['mmseg'] = 'onedl-mmsegmentation'
CACHES[BaseAveragedModel] = refresh_average
MODELS.register_module(name='ExpandBackbone', module=ExpandBackbone)
MODELS.register_module(name='ExpandModel', module=ExpandModel)
HOOKS.register_module(name='ExpandHook', module=ExpandHook)
HOOKS.register_module(name='ContractHook', module=ContractHook)
HOOKS.register_module(name='QuantHook', module=QuantHook)
HOOKS.register_module(name='GradientConfusionHook', module=GradientConfusionHook)
DATASETS.register_module(name='CorruptLabels', module=CorruptLabels)
HOOKS.register_module(name='DistillHook', module=DistillHook)
allow_mmengine_checkpoints()

__all__ = [
    'ContractHook',
    'CorruptLabels',
    'DistillHook',
    'ExpandBackbone',
    'ExpandHook',
    'ExpandModel',
    'ExpandOptimWrapperConstructor',
    'GradientConfusionHook',
    'QuantHook',
]
