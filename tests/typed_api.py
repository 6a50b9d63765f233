"""The public API as a user's type checker sees it: `make lint` checks it, nothing runs it."""

import torch
from torch import nn
from typing_extensions import assert_type

import mmexpand
from mmexpand import (
    ExpandConfig,
    ExpandedConv2d,
    ExpandedConvTranspose2d,
    ExpandedLinear,
    LayerPlan,
    Plan,
)
from mmexpand.mm import (
    ContractHook,
    CorruptLabels,
    ExpandBackbone,
    ExpandHook,
    ExpandModel,
    GradientConfusionHook,
)
from mmexpand.surgery import SkippedLayer, Verification, copy_model

assert_type(mmexpand.__version__, str)


def whole_models(model: nn.Module, images: torch.Tensor) -> None:
    cfg = ExpandConfig(include=['backbone'], exclude='kernel:1x1', method='cl', rate=2.5)
    assert_type(mmexpand.plan(model, method='cl'), Plan)
    expanded = mmexpand.expand_(model, cfg)
    assert_type(mmexpand.plan(model, method='repvgg', include='backbone'), Plan)
    assert_type(mmexpand.expand_(model, mmexpand.plan(model, method='cl')), Plan)
    assert_type(expanded.layers, list[LayerPlan])
    assert_type(expanded.skipped, list[SkippedLayer])
    assert_type(expanded.params_after, int)
    assert_type(mmexpand.is_expanded(model), bool)
    compact = mmexpand.contract(copy_model(model))
    assert_type(compact, nn.Module)
    assert_type(mmexpand.contract_(model), nn.Module)
    report = mmexpand.verify(model, compact, lambda network: network(images))
    assert_type(report, Verification)
    assert_type(report.max_error, float)
    assert_type(report.worst_layer, str)


def single_layers(conv: nn.Conv2d, up: nn.ConvTranspose2d, linear: nn.Linear) -> None:
    unit = ExpandedConv2d.from_conv(conv, method='ck', rate=4, init='preserve')
    assert_type(unit, ExpandedConv2d)
    assert_type(unit.weight, torch.Tensor)
    assert_type(unit.to_conv(), nn.Conv2d)
    transposed = ExpandedConvTranspose2d.from_conv(up, rate=2)
    assert_type(transposed, ExpandedConvTranspose2d)
    assert_type(transposed.to_conv(), nn.ConvTranspose2d)
    assert_type(ExpandedLinear.from_linear(linear, rate=2).to_linear(), nn.Linear)


def openmmlab() -> None:
    hook = ExpandHook(include='backbone', method='repvgg', forward='folded')
    assert_type(hook, ExpandHook)
    assert_type(ContractHook(report=True), ContractHook)
    assert_type(ExpandModel(dict(type='YOLOV3'), method='cl', rate=4), nn.Module)
    assert_type(ExpandBackbone(dict(type='ResNet'), method='cl'), nn.Module)
    assert_type(GradientConfusionHook(pairs=10, interval=500), GradientConfusionHook)
    assert_type(CorruptLabels(dict(type='VOCDataset'), fraction=0.2), CorruptLabels)
