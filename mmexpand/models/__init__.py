"""Networks that the OpenMMLab stack lacks: classifiers, and a detector for mmdet."""

from importlib.util import find_spec

from .cifar import CIFARDataPreprocessor, TopAccuracy, ZippedImages
from .smallnet import SmallNet
from .transfer_losses import HintLoss, KDLoss, PKTLoss

__all__ = [
    'CIFARDataPreprocessor',
    'HintLoss',
    'KDLoss',
    'PKTLoss',
    'SmallNet',
    'TopAccuracy',
    'ZippedImages',
]

if find_spec('torchvision'):
    from .resnet import ResNet18

    __all__ += ['ResNet18']

if find_spec('mmdet'):
    from . import ssd  # noqa: F401
    from .yolo_lite import YOLOLite
    from .yolov2_head import YOLOV2Head

    __all__ += ['YOLOLite', 'YOLOV2Head']
