"""Compact networks that the OpenMMLab stack lacks, registered as mmdet models."""

from .yolo_lite import YOLOLite
from .yolov2_head import YOLOV2Head

__all__ = ['YOLOLite', 'YOLOV2Head']
