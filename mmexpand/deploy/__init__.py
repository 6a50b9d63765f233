"""Taking the compact network out of PyTorch."""

from .errors import ExportError
from .model import load_compact_model, preprocess
from .network import Pixels
from .onnx import OnnxReport, export_onnx

__all__ = [
    'ExportError',
    'OnnxReport',
    'Pixels',
    'export_onnx',
    'load_compact_model',
    'preprocess',
]
