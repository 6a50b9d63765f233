"""Transposed convolutions: every block, folded, layer by layer and contracted, is one function."""

import copy
from itertools import product

import pytest
import torch
from test_blocks import ALL, LINEAR, NORMED, assert_contracts_without_a_model, name
from test_units import relative_error, trained
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mmexpand
from mmexpand import ExpandConfig, ExpandedConv2d, ExpandedConvTranspose2d
from mmexpand.analysis.complexity import layer_costs
from mmexpand.core.algebra import transpose
from mmexpand.core.batch_sample import steps
from mmexpand.core.folded_parameter import FoldedParameter
from mmexpand.core.layer_spec import LayerSpec
from mmexpand.mm.warm_start import pulled_back
from mmexpand.surgery.verify import IN_MODEL, ON_RANDOM, VerificationError

CHAINS = [dict(method='cl'), dict(method='ck')]
GEOMETRIES = [
    dict(stride=stride, padding=padding, output_padding=extra, dilation=dilation)
    for stride, padding, extra, dilation in product(
        (1, 2, (3, 2)), (0, 1, (2, 3)), (0, 1, (0, 1)), (1, (2, 1))
    )
    if extra == 0 or stride != 1
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def kernels(how):
    """Return sizes that fit a block: even ones too, if it centres no smaller kernel."""
    if 'ck' in how.values():
        return [5, 7]
    even = how in (dict(method='cl'), dict(method='do'))
    return [3, (5, 3), *([4, (2, 3)] if even else [])]


def transposed(outputs=4, kernel=3, **options):
    return nn.ConvTranspose2d(4, outputs, kernel, **options).double()


@pytest.mark.parametrize('how', [*CHAINS, *ALL], ids=name)
@pytest.mark.parametrize(
    ('part', 'groups', 'outputs', 'bias'),
    [
        (part, groups, *rest)
        for part, (rest, groups) in enumerate(product([(4, True), (8, False)], (1, 2, 4)))
    ],
)
def test_folded_is_layerwise_is_contracted(how, part, groups, outputs, bias):
    """Each block meets every geometry and every kernel with one of the six combinations."""
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    for kernel, geometry in [*product(kernels(how), GEOMETRIES)][part::6]:
        conv = transposed(outputs, kernel, groups=groups, bias=bias, **geometry)
        unit = trained(ExpandedConvTranspose2d.from_conv(conv, 2, **how)).eval()
        reference = unit.forward_layerwise(x)
        assert relative_error(conv(x), reference) > 0.1, 'the unit was to be another function'
        contracted = unit.to_conv()
        assert type(contracted) is nn.ConvTranspose2d
        assert str(contracted) == str(conv)
        assert contracted.state_dict().keys() == conv.state_dict().keys()
        assert relative_error(contracted(x), reference) < 1e-10
        assert relative_error(unit(x), reference) < 1e-10
        if unit.is_linear:
            for unit.forward_order in ('folded', 'layerwise', 'auto'):
                assert relative_error(unit.train()(x), reference) < 1e-10


@pytest.mark.parametrize('how', [*CHAINS, *LINEAR], ids=name)
@pytest.mark.parametrize('forward', ['folded', 'auto'])
@pytest.mark.parametrize('size', [(1, 1), (9, 7)])
def test_gradients_are_those_of_the_factors(how, forward, size):
    conv = transposed(8, kernels(how)[-1], stride=2, output_padding=1, groups=2)
    unit = trained(ExpandedConvTranspose2d.from_conv(conv, 2, forward=forward, **how))
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    inputs = [x, *unit.parameters()]
    reference = torch.autograd.grad(unit.forward_layerwise(x).square().sum(), inputs)
    gradients = torch.autograd.grad(unit(x).square().sum(), inputs)
    for gradient, expected in zip(gradients, reference, strict=True):
        assert expected.abs().max() > 0
        assert relative_error(gradient, expected) < 1e-10


@pytest.mark.parametrize('how', [*CHAINS, *LINEAR], ids=name)
@pytest.mark.parametrize('groups', [1, 2])
def test_preserve(how, groups):
    conv = transposed(8, kernels(how)[-1], stride=2, padding=1, groups=groups)
    unit = ExpandedConvTranspose2d.from_conv(conv, 4, init='preserve', **how)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    assert relative_error(unit.weight, conv.weight) < 1e-10
    assert relative_error(unit.bias, conv.bias) < 1e-10
    assert relative_error(unit.forward_layerwise(x), conv(x)) < 1e-10
    trained(unit)
    assert relative_error(unit.weight, conv.weight) > 0.1
    unit.load_state_dict(conv.state_dict())
    assert relative_error(unit(x), conv(x)) < 1e-10


@pytest.mark.parametrize('how', NORMED, ids=name)
@pytest.mark.parametrize('stride', [2, 3])
def test_norms_are_measured_on_pixels_of_every_kind(how, stride):
    if how['method'] == 'dbb':
        pytest.skip('its inner norms do not see the padded pixels when they are measured')
    conv = transposed(4, kernels(how)[0], stride=stride)
    branches = trained(ExpandedConvTranspose2d.from_conv(conv, **how))
    measured = copy.deepcopy(branches)
    measured.forward_order = 'folded'
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(measured(x), branches(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(measured.to_conv().weight, branches.to_conv().weight)
    # Of stride 3, every third pixel would be of one kind.
    assert steps(2500, measured.spec) == {2: (3, 3), 3: (1, 1)}[stride]


def test_norms_start_from_given_weights():
    torch.manual_seed(0)
    conv = transposed().double()
    unit = ExpandedConvTranspose2d.from_conv(
        conv, method='repvgg', init='preserve', forward='layerwise'
    )
    x = torch.randn(2, conv.in_channels, 6, 6, dtype=torch.float64)
    for mode in (False, True):
        unit.train(mode)
        torch.testing.assert_close(unit(x), conv(x), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(unit(x[:1]), conv(x[:1]))


@pytest.mark.parametrize('forward', ['folded', 'layerwise'])
def test_output_size(forward):
    conv = transposed(6, 3, stride=(3, 2), padding=1, output_padding=(0, 1))
    unit = trained(ExpandedConvTranspose2d.from_conv(conv, 2, forward=forward))
    compact = unit.to_conv()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    for size in ([15, 11], [2, 6, 14, 12], None):
        for given in (unit(x, output_size=size), unit.forward_layerwise(x, size)):
            assert relative_error(given, compact(x, output_size=size)) < 1e-10
        assert unit(x, size).shape != unit(x, [13, 11]).shape
    with pytest.raises(ValueError, match='valid sizes range'):
        unit(x, output_size=[20, 20])


@pytest.mark.parametrize('how', [*CHAINS, *ALL], ids=name)
@pytest.mark.parametrize('groups', [1, 2])
def test_a_state_dict_contracts_without_a_model(how, groups):
    size = kernels(how)[0]
    net = nn.Sequential(
        transposed(8, size, groups=groups, stride=2), nn.Conv2d(8, 4, size, bias=False).double()
    )
    mmexpand.expand_(net, ExpandConfig(rate=0.5, init='default', **how))
    assert_contracts_without_a_model(trained(net))


@pytest.mark.parametrize('how', [*CHAINS, *LINEAR], ids=name)
def test_factors_of_a_convolution_are_not_taken_for_a_transposed_ones(how):
    size = kernels(how)[0]
    unit = ExpandedConvTranspose2d.from_conv(transposed(4, size), 2, **how)
    other = ExpandedConv2d.from_conv(nn.Conv2d(4, 4, size).double(), 2, **how)
    shapes = [sorted(tuple(p.shape) for p in module.parameters()) for module in (unit, other)]
    assert shapes[0] == shapes[1]
    with pytest.raises(RuntimeError, match='factors of other shapes'):
        unit.load_state_dict(other.state_dict())


def test_the_record_of_other_layers_is_what_it_was():
    spec = LayerSpec.of(nn.Conv2d(4, 6, (3, 5), groups=2, stride=2), 1.5)
    assert spec.record().tolist() == [4, 6, 3, 5, 2, 1, 3, 2, 1]
    spec = LayerSpec.of(nn.ConvTranspose2d(4, 6, (3, 5), groups=2, stride=(2, 1)), 1.5)
    back = LayerSpec.from_record(spec.record(), torch.empty(0))
    assert back.upsampling == (2, 1)
    assert torch.equal(back.record(), spec.record())


def macs(run, x):
    with FlopCounterMode(display=False) as counter:
        run(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize('how', [dict(method='cl'), dict(method='orepa')], ids=name)
def test_costs_are_those_that_torch_counts(how):
    conv = nn.ConvTranspose2d(4, 8, (5, 3), (3, 2), 1, (1, 0), groups=2, bias=False)
    net = nn.Sequential(ExpandedConvTranspose2d.from_conv(conv, 2, **how))
    x = torch.randn(2, 4, 16, 12)
    cost = layer_costs(net, lambda model: model(x))['0']
    assert cost.macs_compact == macs(conv, x)
    scales = 5 * 2 * 8 * 50 * 25 if how['method'] == 'orepa' else 0
    # One product an output of each of orepa's scales is no operation to torch.
    assert 0 <= cost.macs_layerwise - macs(net[0].forward_layerwise, x) <= 1.3 * scales
    assert cost.runs == 'folded'
    assert cost.macs_compact < cost.macs_auto < cost.macs_layerwise
    wide = ExpandedConvTranspose2d.from_conv(nn.ConvTranspose2d(64, 64, 3, 2), **how)
    few = 1, 64, 1, 1
    assert wide.count_macs(few, folded=False) < wide.count_macs(few, folded=True)


@pytest.mark.parametrize('method', ['cl', 'do'])
@pytest.mark.parametrize('groups', [1, 2])
def test_gradients_arrive_through_a_folded_parameter(method, groups):
    conv = transposed(8, 3, stride=2, groups=groups)
    folded = trained(ExpandedConvTranspose2d.from_conv(conv, 4, method, forward='folded'))
    unit = copy.deepcopy(folded)
    unit.folded_parameter = FoldedParameter(unit.kernel, unit.take_offered)
    assert unit.folded_parameter.weight.shape == conv.weight.shape
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    folded(x).square().sum().backward()
    unit(x).square().sum().backward()
    unit.folded_parameter.deliver()
    for ours, theirs in zip(unit.parameters(), folded.parameters(), strict=True):
        assert theirs.grad.abs().max() > 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
        assert ours.grad.stride() == ours.stride()
    # Momentum of the layer becomes the factors' on the same way.
    parameters = unit.folded_parameter.weight, unit.folded_parameter.bias
    unit(x).square().sum().backward()
    found = pulled_back(unit, *(parameter.grad for parameter in parameters))
    for ours, theirs in zip(unit.parameters(), folded.parameters(), strict=True):
        torch.testing.assert_close(found[ours], theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('method', ['cl', 'do'])
def test_what_is_written_to_an_offered_weight_is_taken(method):
    unit = ExpandedConvTranspose2d.from_conv(transposed(6, 3, groups=2), 2, method)
    unit.offer_weight()
    assert unit.weight.shape == (4, 3, 3, 3)
    kernel = torch.randn(4, 3, 3, 3).double()
    unit.weight.data.copy_(kernel)
    nn.init.constant_(unit.bias, -4.6)
    torch.testing.assert_close(unit.to_conv().weight, kernel)
    torch.testing.assert_close(unit.bias, torch.full_like(unit.bias, -4.6))
    assert [p.shape for p in unit.stand_in().parameters()] == [(4, 3, 3, 3), (6,)]


@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('last', [True, False])
def test_the_memory_format_is_the_layers(groups, last):
    form = torch.channels_last if last else torch.contiguous_format
    conv = nn.ConvTranspose2d(4, 4, 3, 2, groups=groups).to(memory_format=form)
    unit = ExpandedConvTranspose2d.from_conv(conv, 2)
    x = torch.randn(2, 4, 9, 9).to(memory_format=form)
    assert unit(x).stride() == conv(x).stride()
    if groups == 1:  # Else the weight is of both formats.
        assert unit.forward_layerwise(x).stride() == conv(x).stride()
        assert unit.to_conv().weight.stride() == conv.weight.stride()


@pytest.mark.parametrize('groups', [1, 3])
def test_turning_a_kernel_twice_leaves_it(groups):
    kernel = torch.randn(6, 2, 3, 4)
    turned = transpose(kernel, groups)
    assert turned.shape == (2 * groups, 6 // groups, 3, 4)
    assert torch.equal(transpose(turned, groups), kernel)


class OwnForward(nn.ConvTranspose2d):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ('layer', 'how', 'error', 'words'),
    [
        (nn.ConvTranspose2d(4, 4, 4), dict(method='rep'), ValueError, r'even \(4x4\)'),
        (nn.ConvTranspose2d(4, 4, 4), dict(method='ck'), ValueError, r'even'),
        (nn.ConvTranspose2d(4, 4, 3), dict(rate=0.5, init='preserve'), ValueError, "can't hold"),
        (OwnForward(4, 4, 3), {}, TypeError, 'forward of its own'),
        (nn.LazyConvTranspose2d(4, 3), {}, TypeError, 'first forward'),
        (nn.Conv2d(4, 4, 3), {}, TypeError, 'not a ConvTranspose2d'),
    ],
)
def test_what_cannot_be_expanded_is_refused(layer, how, error, words):
    with pytest.raises(error, match=words):
        ExpandedConvTranspose2d.from_conv(layer, **how)


class Hourglass(nn.Module):
    """Down, and up again to the size that there was."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, 2, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 3, 2, padding=1)

    def forward(self, x):
        return self.up(self.down(x).relu(), output_size=x.shape[2:])


@pytest.mark.parametrize('forward', ['auto', 'layerwise'])
def test_a_trained_network_is_verified(forward):
    net, x = Hourglass().double(), torch.randn(2, 3, 12, 15, dtype=torch.float64)
    mmexpand.expand_(net, ExpandConfig(method='cl', rate=2, forward=forward))
    before = mmexpand.contract(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (net(x) - x).square().mean().backward()
        optimizer.step()
    compact = mmexpand.contract(net)
    assert relative_error(compact(x), before(x)) > 0.01
    result = mmexpand.verify(net, compact, lambda model: model(x), tolerance=1e-10)
    assert set(result.layers) == {'down', 'up'}
    assert set(result.how.values()) == {IN_MODEL}
    assert result.max_error > 0
    compact.up.weight.data[0, 0, 0, 0] += 1e-3
    with pytest.raises(VerificationError, match=r'1 of 2 layers .* up '):
        mmexpand.verify(net, compact, lambda model: model(x))
    random = mmexpand.verify(net, mmexpand.contract(net), lambda model: model.down(x))
    assert random.how['up'] == ON_RANDOM
    assert 0 < random.layers['up'] < 1e-10
