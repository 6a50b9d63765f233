"""Compact networks that the OpenMMLab stack lacks: a classifier, and a detector for mmdet."""

from importlib.util import find_spec

from .cifar import CIFARDataPreprocessor, TopAccuracy, ZippedImages
from .smallnet import SmallNet

__all__ = ['CIFARDataPreprocessor', 'SmallNet', 'TopAccuracy', 'ZippedImages']

if find_spec('mmdet'):
    from . import ssd  # noqa: F401
    from .yolo_lite import YOLOLite
    from .yolov2_head import YOLOV2Head

    __all__ += ['YOLOLite', 'YOLOV2Head']
