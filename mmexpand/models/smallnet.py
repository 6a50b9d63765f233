"""The compact classifier of the paper's experiments on CIFAR (Sec. 4.1)."""

from mmengine.registry import MODELS
from torch import Tensor, nn

from .classifier import Classifier


@MODELS.register_module()
class SmallNet(Classifier):
    """Convolutions, each with batch norm, ReLU and 2x2 max pooling, then two linear layers.

    Source: Sec. 4.1 of the paper and its CIFAR code; with ``channels=(8, 16, 32, 64)`` and
    ``hidden=64`` on 32x32 images Table 6's network. PyTorch's initialisation.

    Args:
        kernel_size: kernel size of all convolutions; odd.
        channels: output channels of each convolution.
        hidden: features between the linear layers.
        num_classes: number of classes.
        image_size: height and width of the images.
        data_preprocessor: config of the data preprocessor.
    """

    def __init__(
        self,
        kernel_size: int = 7,
        channels: tuple[int, ...] = (8, 16, 32),
        hidden: int = 64,
        num_classes: int = 10,
        image_size: int = 32,
        data_preprocessor: dict | None = None,
    ):
        super().__init__(data_preprocessor)
        layers, inputs = [], 3
        for outputs in channels:
            conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
            inputs = outputs
        self.features = nn.Sequential(*layers)
        features = inputs * (image_size // 2 ** len(channels)) ** 2
        self.classifier = nn.Sequential(
            nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, num_classes)
        )

    def logits(self, inputs: Tensor) -> Tensor:
        """Return scores ``(N, num_classes)``."""
        return self.classifier(self.features(inputs).flatten(1))
