"""Taking the compact network out of PyTorch."""

from .model import load_compact_model, preprocess
from .onnx import OnnxReport, export_onnx

__all__ = ['OnnxReport', 'export_onnx', 'load_compact_model', 'preprocess']
