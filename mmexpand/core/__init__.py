"""Tensors and single layers: the algebra of ExpandNets, and units. Imports torch only."""

from .units import ExpandedConv2d, ExpandedConvTranspose2d, ExpandedLinear

__all__ = ['ExpandedConv2d', 'ExpandedConvTranspose2d', 'ExpandedLinear']
