"""Small networks with weights that hide nothing."""

import torch
from mmengine.hub import get_config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmexpand.mm.models import build_compact_model
from tests.test_mm.test_stock_networks import without_downloads

R18 = {
    'backbone.base_channels': 8,
    'backbone.stem_channels': 8,
    'decode_head.in_channels': 64,
    'decode_head.channels': 16,
    'test_cfg.mode': 'whole',
}
NARROW_CSP = {
    'backbone.widen_factor': 0.125,
    'neck.in_channels': [32, 64, 128],
    'neck.out_channels': 32,
    'bbox_head.in_channels': 32,
    'bbox_head.feat_channels': 32,
    'bbox_head.num_classes': 5,
    'test_cfg.score_thr': 0.2,
}
STOCK = {
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py': NARROW_CSP,
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py': NARROW_CSP,
    'mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py': {
        'bbox_head.num_classes': 5,
        'test_cfg.score_thr': 0.2,
    },
    'mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py': R18,
    'mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py': {
        **R18,
        'decode_head.c1_in_channels': 8,
        'decode_head.c1_channels': 8,
    },
    # Gives classes of the whole image beside the logits.
    'mmseg::encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024.py': {
        'backbone.depth': 18,
        'backbone.base_channels': 8,
        'backbone.stem_channels': 8,
        'decode_head.in_channels': [16, 32, 64],
        'decode_head.channels': 16,
        'auxiliary_head.in_channels': 32,
        'test_cfg.mode': 'whole',
    },
    # Pools to cells that do not divide the features.
    'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py': R18,
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py': {
        'backbone.embed_dims': 12,
        'backbone.depths': [2, 2, 2, 2],
        'decode_head.in_channels': [12, 24, 48, 96],
        'decode_head.channels': 16,
        'auxiliary_head.in_channels': 48,
    },
    'mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py': {},
    'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py': {
        'backbone.num_layers': [1, 1, 1, 1],
        'decode_head.channels': 32,
        'test_cfg.mode': 'whole',
    },
}
"""The issue's networks, narrowed so that a test can wait for them."""


def stock(name, changes):
    """A network of the zoo's in eval mode, settled."""
    cfg = get_config(name)
    without_downloads(cfg._cfg_dict)
    cfg.merge_from_dict({f'model.{key}': value for key, value in changes.items()})
    torch.manual_seed(0)
    model = build_compact_model(cfg)
    return settle(randomise(model))


def randomise(model):
    """Nothing may be left at a value that hides a mistake: zero biases, unit statistics."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                if 'running_var' in name:
                    value.copy_(0.5 + noise)
                elif value.dim() == 1:
                    value.add_(0.3 * (noise - 0.5))
                else:
                    # PyTorch's initialisation shrinks outputs by sqrt(3) a layer: the last would
                    # see little else than biases.
                    value.mul_(3**0.5)
    return model.eval()


def settle(model):
    """Statistics of real activations: deep random networks without them give infinities."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None
            module.reset_running_stats()
    model.train()
    with torch.no_grad():
        model(images(8, 128, 192), mode='tensor')
        for module in getattr(model, 'bbox_head', nn.ModuleList()).modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:  # the last of each branch
                module.weight *= 0.02
    return model.eval()


def images(count, height=64, width=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, height, width, generator=generator)
