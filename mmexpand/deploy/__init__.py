"""Export of the compact network from PyTorch."""

from ..errors import ExportError
from .comparison import compare_file
from .int8 import Int8, Int8Report, LayerError
from .model import (
    calibration_images,
    check_not_normalised,
    load_compact_model,
    preprocess,
    trained_ranges,
)
from .ncnn import export_ncnn
from .network import Pixels
from .onnx import OnnxReport, export_onnx
from .program import export_program
from .runtimes import onnxruntime_run, openvino_run
from .scoring import FileModel, score, table

__all__ = [
    'ExportError',
    'FileModel',
    'Int8',
    'Int8Report',
    'LayerError',
    'OnnxReport',
    'Pixels',
    'calibration_images',
    'check_not_normalised',
    'compare_file',
    'export_ncnn',
    'export_onnx',
    'export_program',
    'load_compact_model',
    'onnxruntime_run',
    'openvino_run',
    'preprocess',
    'score',
    'table',
    'trained_ranges',
]
