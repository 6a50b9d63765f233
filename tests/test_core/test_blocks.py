"""Every block folds, applies and contracts to the same function: float64, trained weights."""

import copy
from itertools import product

import pytest
import torch
from test_units import GEOMETRIES, relative_error, trained
from torch import nn
from torch.nn import functional as F

import mmexpand
from mmexpand import ExpandConfig, ExpandedConv2d
from mmexpand.core import statistics
from mmexpand.core.batch_sample import steps
from mmexpand.core.blocks import BLOCKS
from mmexpand.core.blocks.filters import cosines
from mmexpand.core.expression import Norm
from mmexpand.surgery.checkpoint import contract_state_dict, is_expanded_state_dict

LINEAR = [
    dict(method='cl', shortcut=True),
    dict(method='ck', shortcut=True),
    dict(method='orepa'),
    dict(method='do'),
    dict(method='ac'),
    dict(method='rep'),
]
NORMED = [dict(method=name) for name in ('bn', 'repvgg', 'qarepvgg', 'mobileone', 'acnet', 'dbb')]
NORMED += [dict(method='repvgg', main=main) for main in ('cl', 'ck')]
BEHIND = [dict(how, norm=True) for how in (dict(method='cl'), dict(method='ck'), *LINEAR)]
NORMED += BEHIND
ALL = LINEAR + NORMED


def name(how):
    return '_'.join(key if value is True else value for key, value in how.items())


def is_dense(how):
    """All norms are of many inputs, unless the layer is depthwise."""
    return how['method'] in ('bn', 'acnet', 'qarepvgg') or 'norm' in how


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sizes(how):
    more = [1] if how['method'] == 'mobileone' else []
    return [5, 7] if 'ck' in how.values() else [3, (5, 3), *more]


@pytest.mark.filterwarnings('ignore:Using padding=')
@pytest.mark.parametrize('how', ALL, ids=name)
@pytest.mark.parametrize(
    ('part', 'groups', 'bias', 'outputs'),
    [(part, *rest) for part, rest in enumerate(product((1, 2, 4), (True, False), (4, 8)))],
)
def test_folded_is_layerwise_is_contracted(how, part, groups, bias, outputs):
    """Each block meets every geometry and every kernel with one of the twelve combinations."""
    x = torch.randn(2, 4, 15, 14, dtype=torch.float64)
    for kernel, geometry in [*product(sizes(how), GEOMETRIES)][part::12]:
        conv = nn.Conv2d(4, outputs, kernel, groups=groups, bias=bias, **geometry).double()
        unit = trained(ExpandedConv2d.from_conv(conv, 2, **how)).eval()
        reference = unit.forward_layerwise(x)
        assert relative_error(reference, conv(x)) > 0.1, 'the unit was to be another function'
        contracted = unit.to_conv()
        assert type(contracted) is nn.Conv2d
        assert (contracted.bias is None) == (not bias)
        assert relative_error(contracted(x), reference) < 1e-10
        assert relative_error(unit(x), reference) < 1e-10
        if unit.is_linear:
            for unit.forward_order in ('folded', 'layerwise', 'auto'):
                assert relative_error(unit.train()(x), reference) < 1e-10


@pytest.mark.parametrize('how', LINEAR, ids=name)
@pytest.mark.parametrize('forward', ['folded', 'auto'])
def test_gradients_are_those_of_the_branches(how, forward):
    conv = nn.Conv2d(4, 4, sizes(how)[0], padding=1, stride=2, groups=2).double()
    unit = trained(ExpandedConv2d.from_conv(conv, 2, forward=forward, **how))
    x = torch.randn(2, 4, 15, 14, dtype=torch.float64, requires_grad=True)
    inputs = [x, *unit.parameters()]
    reference = torch.autograd.grad(unit.forward_layerwise(x).square().sum(), inputs)
    gradients = torch.autograd.grad(unit(x).square().sum(), inputs)
    for gradient, expected in zip(gradients, reference, strict=True):
        assert expected.abs().max() > 0
        assert relative_error(gradient, expected) < 1e-10


@pytest.mark.parametrize('how', LINEAR, ids=name)
@pytest.mark.parametrize('groups', [1, 2])
def test_preserve(how, groups):
    for outputs in (4, 8):
        conv = nn.Conv2d(4, outputs, sizes(how)[0], groups=groups).double()
        unit = ExpandedConv2d.from_conv(conv, 4, init='preserve', **how)
        assert relative_error(unit.weight, conv.weight) < 1e-10
        assert relative_error(unit.bias, conv.bias) < 1e-10
        trained(unit)
        assert relative_error(unit.weight, conv.weight) > 0.1
        unit.load_state_dict(conv.state_dict())
        assert relative_error(unit.weight, conv.weight) < 1e-10


@pytest.mark.parametrize('how', NORMED, ids=name)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('forward', ['layerwise', 'folded'])
def test_norms_start_from_given_weights(how, bias, groups, forward):
    torch.manual_seed(0)
    size, stride = sizes(how)[0], 2 if groups == 1 else 1
    geometry = dict(stride=stride, padding=1, dilation=3 - stride, groups=groups)
    conv = nn.Conv2d(4, 8, size, bias=bias, **geometry).double()
    unit = ExpandedConv2d.from_conv(conv, 4, init='preserve', forward=forward, **how)
    batches = torch.randn(3, 4, 4, 28, 28, dtype=torch.float64).relu()
    assert steps(4 * (28 // stride) ** 2, unit.spec) != (1, 1), 'the sample is all pixels'
    unit.eval()
    for x in batches:
        assert relative_error(unit(x), conv(x)) < 1e-10
    unit.train()
    # The first batch is what the norms are anchored at.
    assert relative_error(unit(batches[0]), conv(batches[0])) < 1e-10
    assert relative_error(unit.to_conv().weight, conv.weight) < 0.1
    assert relative_error(unit(batches[1]), conv(batches[1])) > 1e-3, 'no norm is there'
    assert all(norm.running_var.std() > 0 for norm in norms(unit))
    # It trains: the weight that is loaded next is another one.
    unit(batches[2]).square().sum().backward()
    torch.optim.SGD(unit.parameters(), 1e-3).step()
    assert relative_error(unit.to_conv().weight, conv.weight) > 1e-3
    unit.load_state_dict(conv.state_dict())
    assert relative_error(unit(batches[1]), conv(batches[1])) < 1e-10


@pytest.mark.parametrize('how', ALL, ids=name)
@pytest.mark.parametrize('bias', [True, False])
def test_a_state_dict_contracts_without_a_model(how, bias):
    net = nn.Sequential(nn.Conv2d(4, 8, sizes(how)[0], groups=2, bias=bias), nn.BatchNorm2d(8))
    net = net.double()
    mmexpand.expand_(net, ExpandConfig(rate=0.5, init='default', **how))
    assert_contracts_without_a_model(trained(net))


def assert_contracts_without_a_model(net):
    state_dict = net.state_dict()
    assert is_expanded_state_dict(state_dict)
    compact = contract_state_dict(state_dict)
    reference = mmexpand.contract(net).state_dict()
    assert list(compact) == list(reference)
    for key, value in reference.items():
        torch.testing.assert_close(compact[key], value, rtol=1e-12, atol=1e-12)


def test_do_starts_as_the_layer_and_orepa_at_its_constants():
    unit = ExpandedConv2d.from_conv(nn.Conv2d(4, 6, 3, bias=False), method='do')
    kernel = unit.expression.pointwise.weight.view(6, 4, 3, 3)
    torch.testing.assert_close(unit.weight, kernel)
    unit = ExpandedConv2d.from_conv(nn.Conv2d(4, 6, 3, bias=False), method='orepa')
    scales = [branch.scale[0].item() for branch in unit.expression]
    assert scales == [0.25, 0.25, 0.0, 0.5, 1.0, 0.5]


def test_cosines_vary_along_one_axis_each():
    filters = cosines(4, (3, 5))
    assert filters.shape == (4, 3, 5)
    assert torch.equal(filters[0], filters[0, :, :1].expand(3, 5))
    assert torch.equal(filters[3], filters[3, :1].expand(3, 5))
    expected = torch.cos(torch.pi * 2 * (torch.arange(5) + 0.5) / 5)
    torch.testing.assert_close(filters[3, 0], expected)


@pytest.mark.parametrize(
    ('layer', 'how', 'words'),
    [
        (nn.Conv2d(4, 4, 1), dict(method='orepa'), '1x1'),
        (nn.Conv2d(4, 4, 2), dict(method='repvgg'), r'even \(2x2\)'),
        (nn.Conv2d(4, 4, (3, 4)), dict(method='cl', shortcut=True), r'even \(3x4\)'),
        (nn.Conv2d(4, 4, 1), dict(method='do'), '1x1'),
        (nn.Conv2d(4, 4, 3), dict(method='orepa', shortcut=True), 'shortcut=True requires'),
        (nn.Conv2d(4, 4, 3), dict(method='repvgg', norm=True), "'repvgg' has norms of its own"),
        (nn.Conv2d(4, 4, 3), dict(method='fc', norm=True), "'fc' expands linear layers"),
        (nn.Conv2d(4, 4, 3), dict(method='acnet', main='cl'), "main='cl' requires .*'repvgg'"),
        (nn.Conv2d(4, 4, 3), dict(method='repvgg', main='do'), "main must be one of 'cl', 'ck'"),
        (nn.Conv2d(4, 4, 3), dict(method='repvgg', main='ck'), "'repvgg main=ck' does not fit"),
        (nn.Conv2d(4, 4, 3), dict(norm=True, nonlinear='relu'), 'not with norm=True'),
    ],
)
def test_unfit_layers_are_refused_with_the_reason(layer, how, words):
    with pytest.raises(ValueError, match=words):
        ExpandedConv2d.from_conv(layer, **how)


class Net(nn.Module):
    """A convolution without bias and the norm behind it, and one with a bias."""

    def __init__(self, how):
        super().__init__()
        size = sizes(how)[0]
        self.first = nn.Conv2d(4, 4, size, padding=size // 2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 6, size, padding=size // 2, stride=2)

    def forward(self, x):
        return self.second(self.norm(self.first(x)).relu())


@pytest.mark.parametrize('how', NORMED, ids=name)
def test_norms_measured_on_all_pixels_are_batch_norms(how):
    """Where a norm follows, their shift is nothing; where none does, it is in the bias."""
    if how['method'] == 'dbb':
        pytest.skip('its inner norms do not see the padded pixels when they are measured')
    branches = Net(how).double()
    mmexpand.expand_(branches, ExpandConfig(**how))
    for parameter in branches.parameters():
        parameter.data.normal_()
    measured = copy.deepcopy(branches)
    for unit in (measured.first, measured.second):
        unit.forward_order = 'folded'
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    assert steps(2 * 9 * 8, measured.first.spec) == (1, 1)
    torch.testing.assert_close(measured(x), branches(x), rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(norms(measured), norms(branches), strict=True):
        torch.testing.assert_close(ours.running_var, theirs.running_var)
        assert not torch.equal(ours.running_var, torch.ones_like(ours.running_var))
    # Of qarepvgg's first layer, which has no bias, the inner norm shifts the outer one's inputs.
    part = 'second' if how['method'] == 'qarepvgg' else ''
    pairs = zip(*(norms(m.get_submodule(part)) for m in (measured, branches)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)


@pytest.mark.parametrize('how', NORMED, ids=name)
def test_norms_measured_where_taps_see_padding_only(how):
    """As ASPP's largest dilation does on small images: taps that meet no pixel of the image."""
    if {'dbb', 'ck'} & {*how.values()}:
        pytest.skip('its inner norms see padding; its kernel is larger')
    dilated = nn.Sequential(nn.Conv2d(4, 4, 3, padding=6, dilation=6)).double()
    mmexpand.expand_(dilated, ExpandConfig(**how))
    for parameter in dilated.parameters():
        parameter.data.normal_()
    x = torch.randn(8, 4, 5, 4, dtype=torch.float64)
    measured = copy.deepcopy(dilated)
    measured[0].forward_order = 'folded'
    torch.testing.assert_close(measured(x), dilated(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('how', NORMED, ids=name)
def test_of_few_pixels_the_gradient_is_that_of_the_branches(how):
    """As deep down in a network with small images: it grew by orders of magnitude a layer."""
    size = sizes(how)[0]
    layers = [
        part for _ in range(4) for part in (nn.Conv2d(4, 4, size, padding=size // 2), nn.ReLU())
    ]
    branches = nn.Sequential(*layers).double()
    mmexpand.expand_(branches, ExpandConfig(**how))
    folded = copy.deepcopy(branches)
    for unit in folded[::2]:
        unit.forward_order = 'folded'
    few, many = (torch.randn(2, 4, side, side, dtype=torch.float64) for side in (5, 6))
    for x, same in ((few, True), (many, False)):
        gradients = []
        for model in (branches, folded):
            x.requires_grad_().grad = None
            model(x).square().sum().backward()
            gradients.append(x.grad)
        assert gradients[0].abs().max() > 0
        assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12) == same


@pytest.mark.parametrize('how', NORMED, ids=name)
def test_norms_that_a_network_keeps_in_eval_mode_stay_so(how):
    """As mmdet's backbones do with norm_eval=True, all norms inside."""
    branches = Net(how).double()
    mmexpand.expand_(branches, ExpandConfig(**how))
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    branches(x)
    for module in norms(branches):
        module.eval()
    folded = copy.deepcopy(branches)
    for unit in (folded.first, folded.second):
        unit.forward_order = 'folded'
    assert folded.first.training
    torch.testing.assert_close(folded(x), branches(x), rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(norms(folded), norms(branches), strict=True):
        assert torch.equal(ours.running_var, theirs.running_var)
        assert not torch.equal(ours.running_var, torch.ones_like(ours.running_var))


def test_running_statistics_may_be_plain_averages():
    """As of norms whose momentum is None."""
    branches = Net(dict(method='repvgg')).double()
    mmexpand.expand_(branches, ExpandConfig(method='repvgg', forward='layerwise'))
    for module in norms(branches):
        module.momentum = None
    measured = copy.deepcopy(branches)
    for unit in (measured.first, measured.second):
        unit.forward_order = 'folded'
    for _ in range(3):
        x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
        torch.testing.assert_close(measured(x), branches(x), rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(norms(measured), norms(branches), strict=True):
        torch.testing.assert_close(ours.running_var, theirs.running_var)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        assert ours.num_batches_tracked == 3


@pytest.mark.parametrize(
    ('how', 'groups'),
    [(how, groups) for groups in (1, 4) for how in NORMED if groups == 4 or not is_dense(how)],
)
def test_a_dead_channel_does_not_blow_up_the_kernel(monkeypatch, how, groups):
    """In every mode by the same floor: norms of one input have no variance, as behind a ReLU."""
    size = sizes(how)[0]
    conv = nn.Conv2d(4, 4, size, padding=size // 2, groups=groups).double()
    branches = ExpandedConv2d.from_conv(conv, forward='layerwise', **how)
    floored = [m.norm for m in branches.modules() if isinstance(m, Norm) and m.floored]
    for norm in floored:
        norm.running_var.uniform_(0.5, 2)[0] = 1e-40
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    measured = copy.deepcopy(branches)
    measured.forward_order = 'folded'
    if how['method'] != 'dbb':  # Its inner norms do not see the padded pixels.
        torch.testing.assert_close(measured(x), branches(x), rtol=1e-9, atol=1e-9)
    for norm in floored:
        norm.running_var[0] = 1e-40
    contracted = branches.eval().to_conv()
    assert relative_error(contracted(x), branches.forward_layerwise(x)) < 1e-10
    assert contracted.weight.abs().max() < 15
    monkeypatch.setattr(statistics, 'FLOOR', 1e-12)
    assert branches.to_conv().weight.abs().max() > 20


@pytest.mark.parametrize('how', NORMED, ids=name)
def test_no_images_leave_no_trace(how):
    """As of a detector's second stage that is given no proposals."""
    model = Net(how).double()
    mmexpand.expand_(model, ExpandConfig(**how, forward='folded'))
    before = copy.deepcopy(model.first.state_dict())
    found = model.first(torch.randn(0, 4, 9, 8, dtype=torch.float64))
    found.sum().backward()
    assert found.shape == (0, 4, 9, 8)
    for key, value in model.first.state_dict().items():
        assert torch.equal(value, before[key]), key
    gradients = [p.grad for p in model.first.parameters() if p.grad is not None]
    assert gradients and all((gradient == 0).all() for gradient in gradients)


def norms(model):
    return [module.norm for module in model.modules() if isinstance(module, Norm)]


@pytest.mark.parametrize('how', NORMED, ids=name)
@pytest.mark.parametrize('forward', ['auto', 'folded'])
def test_training_with_norms_learns_and_contracts_exactly(how, forward):
    model = Net(how).double()
    mmexpand.expand_(model, ExpandConfig(forward=forward, **how))
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    taken = steps(8 * 24 * 24, model.first.spec, model.first._least_samples)
    assert taken == ((3, 3) if how['method'] in ('dbb', 'qarepvgg') else (5, 3))
    losses = []
    for _ in range(40):
        x = torch.randn(8, 4, 24, 24, dtype=torch.float64)
        loss = (model(x) - x[:, :1, ::2, ::2].abs()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    compact = mmexpand.contract(model)
    assert list(compact.state_dict()) == list(Net(how).state_dict())
    result = mmexpand.verify(model, compact, lambda m: m(x), tolerance=1e-10)
    assert len(result.layers) == 2
    # What was learnt with the batch's statistics is there with the running ones.
    loss = (compact(x) - x[:, :1, ::2, ::2].abs()).square().mean()
    assert loss.item() < 0.7 * losses[0]


@pytest.mark.parametrize('how', ALL, ids=name)
def test_block_files_show_one_formula(how):
    formula = BLOCKS[how['method']].build.__doc__
    assert '=' in formula or 'BN' in formula


@pytest.mark.parametrize('padding', [1, 2])
@pytest.mark.parametrize('method', ['rep', 'repvgg', 'mobileone'])
def test_few_channels_kept_last_with_a_stride(method, padding):
    """oneDNN writes that gradient of a strided 1x1 convolution beyond its memory."""
    last = torch.channels_last
    conv = nn.Conv2d(3, 16, 3, stride=2, padding=padding)
    unit = ExpandedConv2d.from_conv(conv, 1, forward='layerwise', method=method)
    images = torch.randn(4, 3, 32, 32)
    outputs = unit(images)
    weights = torch.randn_like(outputs)
    expected = torch.autograd.grad((outputs * weights).sum(), [*unit.parameters()])
    unit, images = unit.to(memory_format=last), images.contiguous(memory_format=last)
    for _ in range(20):
        gradients = torch.autograd.grad((unit(images) * weights).sum(), [*unit.parameters()])
        for gradient, reference in zip(gradients, expected, strict=True):
            assert relative_error(gradient, reference) < 1e-3


@pytest.mark.parametrize('how', BEHIND, ids=name)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('forward', ['layerwise', 'folded'])
def test_a_norm_behind_a_block_normalises_what_its_kernel_gives(how, bias, forward):
    size = sizes(how)[0]
    conv = nn.Conv2d(4, 6, size, stride=2, padding=1, bias=bias).double()
    unit = trained(ExpandedConv2d.from_conv(conv, 2, forward=forward, **how))
    inside, norm = unit.expression.node, unit.expression.norm
    assert not any('bias' in key for key, _ in inside.named_parameters())
    x = torch.randn(8, 4, 15, 14, dtype=torch.float64)
    assert steps(8 * 7 * 6, unit.spec) == (1, 1)
    y = F.conv2d(x, inside.fold(torch.float64)[0], None, 2, 1)
    expected = F.batch_norm(y, None, None, norm.weight, norm.bias, True)
    found = unit(x)
    if not bias:  # There is no shift: the running mean is given back, which the next norm removes.
        expected, found = (z - z.mean((0, 2, 3), keepdim=True) for z in (expected, found))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
