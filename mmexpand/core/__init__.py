"""Tensors and single layers: the algebra of ExpandNets and its two units. Imports torch alone."""

from .units import ExpandedConv2d, ExpandedLinear

__all__ = ['ExpandedConv2d', 'ExpandedLinear']
