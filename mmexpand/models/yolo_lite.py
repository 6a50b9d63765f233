"""Backbone of YOLO-LITE."""

from collections.abc import Sequence

from mmcv.cnn import ConvModule
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn


@MODELS.register_module()
class YOLOLite(BaseModule):
    """Backbone of YOLO-LITE, a detector for machines without a GPU.

    A 3x3 convolution, leaky ReLU and 2x2 max pooling per stage. With the default five stages the
    stride is 32. By default there is no batch normalisation, and convolutions have a bias.

    Source: Huang, Pedoeem and Chen, "YOLO-LITE: A Real-Time Object Detection Algorithm Optimized
    for Non-GPU Computers", IEEE Big Data 2018, the network "trial 3, no batch normalisation".

    Args:
        in_channels: Channels of the input image.
        channels: Output channels of each stage.
        norm_cfg: Config of the norm behind each convolution, which then has no bias; None: none.
        act_cfg: Config of the activation.
        init_cfg: Initialisation, by default Kaiming's by fan-in for leaky ReLU, biases zero.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: Sequence[int] = (16, 32, 64, 128, 128),
        norm_cfg: dict | None = None,
        act_cfg: dict = dict(type='LeakyReLU', negative_slope=0.1),  # noqa: B006
        init_cfg: dict | list[dict] | None = dict(  # noqa: B006
            type='Kaiming', layer='Conv2d', a=0.1, mode='fan_in', nonlinearity='leaky_relu'
        ),
    ) -> None:
        super().__init__(init_cfg)
        # A plain ModuleList keeps `init_cfg` in charge: as a direct child, ConvModule would
        # initialise itself again, after it, with its own fan-out default.
        self.convs = nn.ModuleList(
            ConvModule(c_in, c_out, 3, padding=1, norm_cfg=norm_cfg, act_cfg=act_cfg)
            for c_in, c_out in zip([in_channels, *channels[:-1]], channels, strict=True)
        )
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Extract features.

        Args:
            x: Images, shape (N, in_channels, H, W), H and W multiples of 32.

        Returns:
            One level, shape (N, channels[-1], H / 32, W / 32), in a tuple as detectors expect.
        """
        for conv in self.convs:
            x = self.pool(conv(x))
        return (x,)
