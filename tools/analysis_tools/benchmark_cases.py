"""Built-in cases of benchmark_training.py, and a case of any config."""

from collections import OrderedDict
from functools import partial
from typing import Any

from mmdet.registry import MODELS as DETECTORS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS as SEGMENTORS
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from mmexpand import ExpandConfig
from mmexpand.analysis.cases import PEERS, Case
from mmexpand.errors import UserValueError
from mmexpand.mm.models import (
    build_compact_model,
    configured_expansions,
    input_channels,
    tensor_outputs,
)

# All 3x3 depthwise convolutions. The paper expands "the non-residual 3x3 convolutional layers"
# without listing them.
DEPTHWISE = r're:^features\.(1\.conv\.0\.0|([2-9]|1[0-7])\.conv\.1\.0)$'


def yolo_lite() -> nn.Module:
    """Return YOLO-LITE's backbone and the two convolutions of its head."""
    backbone = DETECTORS.build(dict(type='YOLOLite'))
    head = DETECTORS.build(dict(type='YOLOV2Head', num_classes=20, in_channels=128))
    return nn.Sequential(OrderedDict(backbone=backbone, bbox_head=head))


def unet(base_channels: int) -> nn.Module:
    """Return the encoder and decoder of mmseg's U-Net, without a decode head."""
    with DefaultScope.overwrite_default_scope('mmseg'):
        return SEGMENTORS.build(dict(type='UNet', base_channels=base_channels))


def config_outputs(model: nn.Module, images: Tensor) -> Any:
    """Return the raw outputs of an OpenMMLab model."""
    return tensor_outputs(model, dict(inputs=images))


def config_case(filename: str, cfg: Config, batch_size: int, shape: tuple[int, int]) -> Case:
    """Return the case of a config's model on random images.

    Args:
        filename: the path of the config, for the name of the case.
        cfg: a config that expands something.
        batch_size: number of images.
        shape: their height and width.

    Raises:
        ValueError: if the config expands nothing.
    """
    expansions = configured_expansions(cfg)
    if not expansions:
        raise UserValueError(
            f'{filename} expands nothing; give a config with an ExpandHook, ExpandModel or '
            'ExpandBackbone: the compact model it starts from is timed beside it'
        )
    name = filename.rpartition('/')[2].removesuffix('.py')
    build = partial(build_compact_model, cfg)
    images = (batch_size, input_channels(build()), *shape)
    return Case(name, build, images, tuple(expansions), config_outputs)


def _unet_case(base_channels: int, input_shape: tuple[int, ...], **others: Any) -> Case:
    encoder = (('', ExpandConfig(method='cl', include='encoder')),)
    return Case(
        f'unet-{base_channels}', partial(unet, base_channels), input_shape, encoder, **others
    )


BUILT_IN = {
    case.name: case
    for case in (
        Case(
            'mobilenetv2',
            mobilenet_v2,
            (16, 3, 224, 224),
            (('', ExpandConfig(method='cl', include=DEPTHWISE)),),
        ),
        Case(
            'yolo-lite',
            yolo_lite,
            (16, 3, 224, 224),
            (('', ExpandConfig(method='cl', include='backbone')),),
            peers=tuple(PEERS),
        ),
        _unet_case(16, (4, 3, 240, 320), peers=tuple(PEERS)),
        _unet_case(32, (2, 3, 256, 512)),
        # The paper trains on 4 images of 512x1024 per GPU.
        _unet_case(64, (1, 3, 256, 512), counted_shape=(4, 3, 512, 1024)),
    )
}
