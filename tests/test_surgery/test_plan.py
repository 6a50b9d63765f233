"""The layers of a plan, and the reasons of skipped layers."""

import dataclasses
import inspect
import re
from collections import OrderedDict

import pytest
import torch
from mmdet.models import MobileNetV2
from torch import nn
from torchvision.ops import DeformConv2d

import mmexpand
from mmexpand import ExpandConfig
from mmexpand.mm import ExpandBackbone, ExpandHook, ExpandModel
from mmexpand.surgery.plan import matches


class Odd(nn.Conv2d):
    def forward(self, x):
        return -super().forward(x)


def net():
    tied = nn.Conv2d(4, 4, 1)
    tied_too = nn.Conv2d(4, 4, 1)
    tied_too.weight = tied.weight
    return nn.ModuleDict(
        {
            'backbone': nn.ModuleDict(
                {'conv1': nn.Conv2d(3, 4, 3), 'conv2': nn.Conv2d(4, 4, 7), 'fc': nn.Linear(4, 4)}
            ),
            'up': nn.ConvTranspose2d(4, 4, 2),
            'deform': DeformConv2d(4, 4, 3),
            'lazy': nn.LazyConv2d(4, 3),
            'odd': Odd(4, 4, 3),
            'tied': tied,
            'tied_too': tied_too,
            'conv3d': nn.Conv3d(4, 4, 3),
            'up1d': nn.ConvTranspose1d(4, 4, 2),
            'quantised': torch.ao.nn.quantized.Conv2d(4, 4, 3),
        }
    )


def test_every_layer_is_planned_or_skipped_with_its_reason():
    plan = mmexpand.plan(net(), ExpandConfig(method='cl'))
    assert [layer.name for layer in plan] == ['backbone.conv1', 'backbone.conv2', 'up']
    reasons = {layer.name: layer.reason for layer in plan.skipped}
    for name, words in {
        'backbone.fc': 'convolutions only',
        'deform': 'DeformConv2d',
        'lazy': 'first forward',
        'odd': 'forward of its own',
        'tied': 'shares',
        'tied_too': 'shares',
        'conv3d': 'Conv3d is not supported',
        'up1d': 'ConvTranspose1d is not supported',
        'quantised': 'quantised',
    }.items():
        assert words in reasons.pop(name)
    assert not reasons


def test_entries_say_what_becomes_of_a_layer():
    plan = mmexpand.plan(net(), ExpandConfig('auto', 2, include='backbone', init='default'))
    first, second = plan
    assert first.method == 'cl'
    assert first.factor_shapes == ((6, 3, 1, 1), (8, 6, 3, 3), (4, 8, 1, 1))
    assert first.params_before == 4 * 3 * 9 + 4
    assert first.params_after == 6 * 3 + 8 * 6 * 9 + 4 * 8 + 6 + 8 + 4
    assert second.method == 'ck'
    assert second.factor_shapes == ((8, 4, 3, 3), (8, 8, 3, 3), (4, 8, 3, 3))
    assert {layer.reason for layer in plan.skipped if layer.name == 'odd'} == {'not included'}


def test_rounding():
    plan = mmexpand.plan(
        nn.Sequential(nn.Conv2d(3, 10, 3)), ExpandConfig(method='cl', rate=0.25, init='default')
    )
    assert plan.layers[0].factor_shapes == ((1, 3, 1, 1), (3, 1, 3, 3), (10, 3, 1, 1))


@pytest.mark.parametrize(
    ('pattern', 'expected'),
    [
        ('backbone', True),
        ('backbone.conv1', True),
        ('backbone.conv', False),
        ('back', False),
        ('*.conv[12]', True),
        ('re:conv1$', True),
        ('re:^conv', False),
    ],
)
def test_patterns(pattern, expected):
    assert matches('backbone.conv1', pattern) == expected


@pytest.mark.parametrize(
    ('include', 'exclude', 'expected'),
    [
        ('kernel:3x3', None, ['0.conv', 'b.1.0', 'b.2', 'c.1.0', 'c.2']),
        ('kernel:3x3', 'kind:depthwise', ['0.conv', 'b.2', 'c.2']),
        ('kernel:3x3', 'kind:residual', ['0.conv', 'b.1.0', 'b.2']),
        ('kind:linear', None, ['d']),
        (['kernel:1x1', 'kind:linear'], ['c'], ['b.0.0', 'd']),
    ],
)
def test_layers_by_what_they_are(include, exclude, expected):
    def block(residual):
        one, deep = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4)
        module = nn.Sequential(nn.Sequential(one), nn.Sequential(deep), nn.Conv2d(4, 4, 3))
        module.use_res_connect = residual
        return module

    model = nn.Sequential(OrderedDict(b=block(False), c=block(True), d=nn.Linear(4, 4)))
    model.add_module('0', nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3))))
    cfg = ExpandConfig('cl+fc', include=include, exclude=exclude)
    assert sorted(layer.name for layer in mmexpand.plan(model, cfg)) == expected


def test_the_stock_mobilenetv2_is_expanded_as_in_the_paper():
    """All 3x3 outside of blocks that add their input (Sec. 4.1)."""
    cfg = ExpandConfig(method='cl', include='kernel:3x3', exclude='kind:residual')
    names = [layer.name for layer in mmexpand.plan(MobileNetV2(), cfg)]
    assert names[0] == 'conv1.conv'
    strided = {'layer1.0', 'layer2.0', 'layer3.0', 'layer4.0', 'layer5.0', 'layer6.0', 'layer7.0'}
    assert {'.'.join(name.split('.')[:2]) for name in names[1:]} == strided


def test_exclude():
    plan = mmexpand.plan(net(), ExpandConfig(method='cl', include='backbone', exclude='*.conv2'))
    assert [layer.name for layer in plan] == ['backbone.conv1']
    assert ('backbone.conv2', 'excluded') in [(x.name, x.reason) for x in plan.skipped]


@pytest.mark.parametrize(
    ('fields', 'words'),
    [
        (dict(include='backbon'), r"include='backbon' matches no .*near matches: backbone"),
        (dict(include='backbone', exclude='bakbone.conv1'), r'near matches: backbone\.conv1'),
        (dict(include='kernel:4x4'), 'near matches: kernel:7x7, kernel:3x3'),
        (dict(include='re:xyz'), 'layers are: backbone.conv1'),
        (dict(exclude='re:['), r"exclude='re:\[' is not a regular expression"),
        (dict(method='ck', include='backbone.conv1'), 'backbone.conv1: .*3x3'),
        (dict(method='fc', include='backbone.conv1'), 'linear layers only'),
        (dict(init='preserve', rate=0.5), 'cannot preserve .* backbone.conv1 with .*rate=0.5'),
        (dict(rate=0.5), "init='auto' cannot preserve .*init='default'"),
    ],
)
def test_errors_name_the_way_out(fields, words):
    with pytest.raises(ValueError, match=words):
        mmexpand.plan(net(), ExpandConfig(**{'method': 'cl', **fields}))


@pytest.mark.parametrize(
    ('fields', 'error', 'words'),
    [
        (dict(method=None), TypeError, "method is required: 'bn' suits networks without"),
        (dict(method='CL'), ValueError, "method must be one of 'cl'"),
        (dict(rate=-1), ValueError, 'rate must be'),
        (dict(rate=True), TypeError, 'rate must be'),
        (dict(rate='four'), TypeError, "got 'four'"),
        (dict(init='random'), ValueError, 'init must be'),
        (dict(forward='fused'), ValueError, 'forward must be'),
        (dict(include=3), TypeError, 'include must be'),
        (dict(exclude=[]), TypeError, 'exclude must be'),
    ],
)
def test_config_refuses_nonsense(fields, error, words):
    with pytest.raises(error, match=words):
        ExpandConfig(**{'method': 'cl', **fields})


def test_a_printed_plan_shows_layers_and_reasons():
    model = nn.ModuleDict({'a': nn.ModuleDict(net()), 'b': nn.Conv2d(8, 1024, 3)})
    name = 'c' * 90
    model[name] = nn.ModuleDict({str(index): nn.Linear(4, 4) for index in range(3)})
    model[name + 'd'] = nn.Conv2d(4, 4, 7)
    plan = mmexpand.plan(model, method='dbb', exclude=['a.backbone', 'a.up'])
    lines = str(plan).splitlines()
    assert lines[0].split() == ['layer', 'method', 'params', 'expanded']
    table = lines[1 : lines.index('skipped:')]
    assert table[0].split() == ['b', 'dbb', '74,752', f'{plan.layers[0].params_after:,}']
    assert table[1].split() == ['x'.join(map(str, shape)) for shape in plan.layers[0].factor_shapes]
    # A long name has a line of its own.
    assert table[2] == name + 'd'
    assert table[3].split() == ['dbb', '788', f'{plan.layers[1].params_after:,}']
    assert len(table) == 5
    skipped = ' '.join(' '.join(lines[lines.index('skipped:') + 1 :]).split())
    assert f'{name} (3 layers): ' in skipped
    assert 'a (4 layers): excluded' in skipped
    assert 'a.odd: ' in skipped
    assert lines[-1] == f'parameters of the model: {plan.params_before:,} -> {plan.params_after:,}'
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    'takes',
    [ExpandConfig, mmexpand.plan, mmexpand.expand_, ExpandHook, ExpandModel, ExpandBackbone],
)
def test_every_option_is_shown_with_its_default(takes):
    shown = inspect.signature(takes).parameters
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in shown.values())
    entries = dict(re.findall(r'^        (\w+): (.*?)(?=^ {8}\w|^$)', takes.__doc__, re.M | re.S))
    for field in dataclasses.fields(ExpandConfig):
        assert shown[field.name].default == field.default
        end = 'Required.' if field.name == 'method' else f'Default: {field.default!r}.'
        assert ' '.join(entries[field.name].split()).endswith(end)


def test_a_layer_of_another_library_may_have_a_number_as_kernel_size():
    class Other(nn.Module):
        kernel_size = 3

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

    plan = mmexpand.plan(nn.Sequential(Other(), nn.Conv2d(4, 4, 3)), method='cl')
    assert [layer.name for layer in plan] == ['1']
