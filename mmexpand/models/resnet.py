"""The teacher of the paper's experiments on CIFAR (Sec. 4.1)."""

from mmengine.registry import MODELS
from torch import Tensor, nn
from torchvision.models import resnet18

from .classifier import Classifier


@MODELS.register_module()
class ResNet18(Classifier):
    """ResNet18 for images of 32x32: torchvision's, but for a 3x3 stem and no pooling behind it.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, with CIFAR's usual
    stem.

    Args:
        num_classes: number of classes.
        data_preprocessor: config of the data preprocessor.
    """

    def __init__(self, num_classes: int = 10, data_preprocessor: dict | None = None):
        super().__init__(data_preprocessor)
        self.net = resnet18(num_classes=num_classes)
        self.net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.net.maxpool = nn.Identity()

    def logits(self, inputs: Tensor) -> Tensor:
        """Return scores ``(N, num_classes)``."""
        return self.net(inputs)
