"""An OpenMMLab model as a function of pixels or of normalised images."""

import torch
from torch import Tensor, nn

from ..core.compat import tree_leaves
from ..mm.models import converts_channels, tensor_outputs


class Pixels(nn.Module):
    """Normalisation of a data preprocessor.

    Args:
        data_preprocessor: a data preprocessor with mean, standard deviation and channel conversion.
        order: channel order of the pixels, ``'bgr'`` or ``'rgb'``.
        uint8: whether pixels are bytes; else float32 from 0 to 255.
    """

    def __init__(self, data_preprocessor: nn.Module, order: str = 'bgr', uint8: bool = False):
        super().__init__()
        self.dtype = torch.uint8 if uint8 else torch.float32
        self.order = order
        self.flips = converts_channels(data_preprocessor) != (order == 'rgb')
        mean, std = (getattr(data_preprocessor, name, None) for name in ('mean', 'std'))
        self.register_buffer('mean', torch.zeros(1) if mean is None else mean.clone())
        self.register_buffer('std', torch.ones(1) if std is None else std.clone())

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise pixels, shape (N, C, H, W)."""
        pixels = pixels.float()
        return ((pixels.flip(1) if self.flips else pixels) - self.mean) / self.std

    def invert(self, inputs: Tensor) -> Tensor:
        """Return the pixels, in this module's order and dtype, that give normalised images."""
        pixels = inputs * self.std + self.mean
        pixels = pixels.flip(1) if self.flips else pixels
        return pixels.round().clamp(0, 255).byte() if self.dtype == torch.uint8 else pixels

    def as_loaded(self, pixels: Tensor) -> Tensor:
        """Return pixels in BGR, as the model's own data preprocessor gets them."""
        return (pixels.flip(1) if self.order == 'rgb' else pixels).float()


def file_images(inputs: Tensor, pixels: Pixels | None) -> Tensor:
    """Return preprocessed images as a file takes them: as ``pixels``, or unchanged if None."""
    return inputs if pixels is None else pixels.invert(inputs)


class RawOutputs(nn.Module):
    """Wrapper of an OpenMMLab model: a function from images to a flat tuple of tensors.

    Args:
        model: a detector (its heads' raw outputs), a segmentor (its logits) or a classifier.
        pixels: normalisation of the images; None: they are normalised.
    """

    def __init__(self, model: nn.Module, pixels: Pixels | None = None):
        super().__init__()
        self.model = model
        self.pixels = pixels

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run the model on images of shape (N, C, H, W), preprocessed if ``pixels`` is None."""
        inputs = images if self.pixels is None else self.pixels(images)
        return tuple(tree_leaves(tensor_outputs(self.model, dict(inputs=inputs))))
