"""Every kind of layer becomes factors and comes back exactly: float64, biases, trained weights."""

import copy
import pickle
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from mmexpand import ExpandedConv2d, ExpandedLinear
from mmexpand.core.eligibility import PLAIN_LAYERS
from mmexpand.core.factorise import _semi_orthogonal

KERNELS = [((1, 1), 'cl'), ((3, 3), 'cl'), ((2, 3), 'cl'), ((5, 5), 'ck'), ((7, 7), 'ck')]
GEOMETRIES = [
    dict(stride=stride, padding=padding, dilation=dilation, padding_mode=mode)
    for stride, padding, dilation, mode in product(
        (1, 2), (0, (2, 1), 'same'), (1, 2), ('zeros', 'reflect', 'replicate', 'circular')
    )
    if not (padding == 'same' and stride > 1) and not (padding == 0 and mode != 'zeros')
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(unit):
    """As training leaves it: nothing at its start, biases and statistics of norms included."""
    for parameter in unit.parameters():
        parameter.data.normal_()
    for module in unit.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return unit


def relative_error(result, reference):
    assert result.shape == reference.shape
    return ((result - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.filterwarnings('ignore:Using padding=')
@pytest.mark.parametrize(('kernel', 'method'), KERNELS)
@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('bias', [True, False])
def test_contraction_is_exact(kernel, method, groups, bias):
    x = torch.randn(2, 4, 15, 14, dtype=torch.float64)
    for geometry, rate in product(GEOMETRIES, (2, 0.5)):
        conv = nn.Conv2d(4, 8, kernel, groups=groups, bias=bias, **geometry).double()
        unit = trained(ExpandedConv2d.from_conv(conv, rate, method))
        chain = unit.forward_layerwise(x)
        assert relative_error(chain, conv(x)) > 0.1, 'the unit was to be another function'
        contracted = unit.to_conv()
        assert type(contracted) is nn.Conv2d
        assert relative_error(contracted(x), chain) < 1e-13
        for forward in ('folded', 'auto', 'layerwise'):
            unit.forward_order = forward
            assert relative_error(unit(x), chain) < 1e-13


@pytest.mark.parametrize('forward', ['layerwise', 'folded', 'auto'])
@pytest.mark.parametrize(('kernel', 'method'), KERNELS)
def test_gradients_are_those_of_the_chain(kernel, method, forward):
    conv = nn.Conv2d(4, 8, kernel, padding=1, stride=2, groups=2).double()
    unit = trained(ExpandedConv2d.from_conv(conv, 2, method, forward=forward))
    x = torch.randn(2, 4, 15, 14, dtype=torch.float64, requires_grad=True)
    inputs = [x, *unit.parameters()]
    reference = torch.autograd.grad(unit.forward_layerwise(x).square().sum(), inputs)
    for gradient, expected in zip(
        torch.autograd.grad(unit(x).square().sum(), inputs), reference, strict=True
    ):
        assert expected.abs().max() > 0
        assert relative_error(gradient, expected) < 1e-12


@pytest.mark.parametrize('forward', ['layerwise', 'folded', 'auto'])
@pytest.mark.parametrize('bias', [True, False])
def test_linear(forward, bias):
    linear = nn.Linear(6, 5, bias=bias).double()
    unit = trained(ExpandedLinear.from_linear(linear, 3, forward=forward))
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    chain = unit.forward_layerwise(x)
    assert relative_error(unit(x), chain) < 1e-13
    assert relative_error(unit.to_linear()(x), chain) < 1e-13
    assert relative_error(linear(x), chain) > 0.1
    assert [tuple(factor.weight.shape) for factor in unit.factors] == [(18, 6), (15, 18), (5, 15)]


@pytest.mark.parametrize('size', [5, 7, 9])
@pytest.mark.parametrize('rate', [4, 5.5])
def test_preserve_ck(size, rate):
    conv = nn.Conv2d(3, 4, size, groups=1).double()
    unit = ExpandedConv2d.from_conv(conv, rate, 'ck', init='preserve')
    assert relative_error(unit.weight, conv.weight) < 1e-13
    assert relative_error(unit.bias, conv.bias) < 1e-13


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('rate', [1, 1.5, 4])
def test_preserve_cl_and_fc(groups, rate):
    conv = nn.Conv2d(4, 6, (3, 2), groups=groups).double()
    unit = ExpandedConv2d.from_conv(conv, rate, init='preserve')
    assert relative_error(unit.weight, conv.weight) < 1e-13
    assert relative_error(unit.bias, conv.bias) < 1e-13
    linear = nn.Linear(4, 6).double()
    unit = ExpandedLinear.from_linear(linear, rate, init='preserve')
    assert relative_error(unit.weight, linear.weight) < 1e-13


@pytest.mark.parametrize(('rows', 'columns'), [(700, 600), (600, 1300), (40, 30)])
def test_wide_factors_are_mixed_in_blocks(rows, columns):
    matrix = _semi_orthogonal(rows, columns, like=torch.empty(0, dtype=torch.float64))
    small = min(rows, columns)
    product = matrix.T @ matrix if rows > columns else matrix @ matrix.T
    torch.testing.assert_close(product, torch.eye(small).double(), rtol=0, atol=1e-12)
    assert (matrix != 0).double().mean() > 0.9


def test_a_wide_linear_layer_is_preserved():
    linear = nn.Linear(1024, 300)
    unit = ExpandedLinear.from_linear(linear, 1, init='preserve')
    assert relative_error(unit.weight, linear.weight) < 1e-5


def test_preserve_gives_every_parameter_a_gradient():
    unit = ExpandedConv2d.from_conv(nn.Conv2d(4, 6, 3), 4, init='preserve')
    unit(torch.randn(2, 4, 9, 9)).square().sum().backward()
    for factor in unit.factors:
        rows = factor.weight.grad.flatten(1)
        assert (rows.abs().max(1).values > 0).all()


@pytest.mark.parametrize(
    ('size', 'rate', 'method', 'words'),
    [(3, 0.5, 'cl', "can't hold"), (5, 2, 'ck', 'rate of 4'), (11, 4, 'ck', 'rate of 9')],
)
def test_preserve_says_where_it_is_impossible(size, rate, method, words):
    with pytest.raises(ValueError, match=words):
        ExpandedConv2d.from_conv(nn.Conv2d(4, 4, size), rate, method, init='preserve')


def test_flags_mode_device_dtype_and_format_carry_over_both_ways():
    conv = nn.Conv2d(4, 6, 3, dtype=torch.float64).to(memory_format=torch.channels_last).eval()
    conv.weight.requires_grad_(False)
    unit = ExpandedConv2d.from_conv(conv)
    assert not unit.training
    assert {p.dtype for p in unit.parameters()} == {torch.float64}
    assert not any(factor.weight.requires_grad for factor in unit.factors)
    assert all(factor.bias.requires_grad for factor in unit.factors)
    back = unit.to_conv()
    assert (back.weight.requires_grad, back.bias.requires_grad) == (False, True)
    assert not back.training
    assert back.weight.dtype == torch.float64
    assert back.weight.is_contiguous(memory_format=torch.channels_last)
    assert ExpandedConv2d.from_conv(nn.Conv2d(4, 6, 3)).to_conv().weight.is_contiguous()


def test_moves_and_casts_like_any_module():
    unit = ExpandedConv2d.from_conv(nn.Conv2d(4, 6, 3))
    x = torch.randn(1, 4, 8, 8)
    assert unit.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert unit.to_conv().weight.dtype == torch.bfloat16
    unit.double().to(memory_format=torch.channels_last)
    assert unit(x.double()).is_contiguous(memory_format=torch.channels_last)
    assert not unit.to_conv().weight.is_contiguous()
    unit.to(memory_format=torch.contiguous_format)
    assert unit(x.double()).is_contiguous()
    assert unit.to('meta').to_conv().weight.is_meta


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda unit: pickle.loads(pickle.dumps(unit))])
def test_copies_compute_the_same_and_are_independent(clone):
    unit = trained(ExpandedConv2d.from_conv(nn.Conv2d(4, 6, 3))).eval()
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        y = unit(x)
        other = clone(unit)
        assert torch.equal(other(x), y)
        other.factors[0].weight.mul_(2)
        assert not torch.allclose(other(x), y)
        assert torch.equal(unit(x), y)


def test_a_subclass_comes_back_as_it_was():
    class Named(nn.Conv2d):
        def __init__(self, channels):
            super().__init__(channels, channels, 3)
            self.note = 'kept'

    back = ExpandedConv2d.from_conv(Named(4)).to_conv()
    assert type(back) is Named
    assert back.note == 'kept'


def test_kept_product_follows_every_change():
    unit = trained(ExpandedConv2d.from_conv(nn.Conv2d(4, 6, 3).double()))
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)

    def step(**kind):
        def change():
            unit(x).square().mean().backward()
            torch.optim.SGD(unit.parameters(), 1e-5, **kind).step()

        return change

    def load():
        unit.load_state_dict({k: v + 1 for k, v in unit.state_dict().items()})

    def edit():
        with torch.no_grad():
            unit.factors[1].bias.add_(1)

    def replace():
        unit.factors[0].weight = nn.Parameter(unit.factors[0].weight.detach() * 2)

    def swap_as_ema_hook():
        unit.factors[0].weight.data.mul_(2)
        unit.eval()

    def recast():
        unit.float().double()

    unit.eval()
    with torch.no_grad():
        kept = unit(x)
        assert unit.folded() is unit.folded(), 'it was to be kept'
    steps = step(foreach=False), step(foreach=True), step(fused=True)
    for change in (*steps, load, edit, replace, swap_as_ema_hook, recast):
        change()
        with torch.no_grad():
            now = unit(x)
            assert relative_error(now, unit.forward_layerwise(x)) < 1e-12, change
            assert not torch.equal(now, kept), change
        kept = now


def test_compact_weights_are_factorised_while_loading():
    conv = nn.Conv2d(4, 6, 3).double()
    unit = ExpandedConv2d.from_conv(nn.Conv2d(4, 6, 3).double())
    assert relative_error(unit.weight, conv.weight) > 0.1
    unit.load_state_dict(conv.state_dict())
    assert relative_error(unit.weight, conv.weight) < 1e-13
    before = {key: value.clone() for key, value in unit.state_dict().items()}
    with pytest.raises(RuntimeError, match='size mismatch for weight'):
        unit.load_state_dict(nn.Conv2d(4, 7, 3).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in unit.state_dict().items())
    both = {**ExpandedConv2d.from_conv(conv, 2).state_dict(), **conv.state_dict()}
    with torch.no_grad():
        unit.factors[1].weight.normal_()
    unit.load_state_dict(both)
    assert relative_error(unit.weight, conv.weight) < 1e-13
    narrow = ExpandedConv2d.from_conv(nn.Conv2d(4, 6, 3), 0.5)
    with pytest.raises(ValueError, match='raise the rate'):
        narrow.load_state_dict(conv.state_dict())


@pytest.mark.parametrize('method', ['cl', 'repvgg'])
@pytest.mark.parametrize('bias', [False, True])
def test_a_weight_loads_without_its_bias_as_in_a_layer(method, bias):
    source, layer = nn.Conv2d(4, 6, 3, bias=not bias), nn.Conv2d(4, 6, 3, bias=bias)
    unit = ExpandedConv2d.from_conv(layer.double(), 2, method)
    before = unit.bias
    found = unit.load_state_dict(source.state_dict(), strict=False)
    assert found == layer.load_state_dict(source.state_dict(), strict=False)
    assert ['bias'] in found
    assert relative_error(unit.weight, source.weight.double()) < 1e-12
    if bias:
        torch.testing.assert_close(unit.bias, before, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match='bias'):
        unit.load_state_dict(source.state_dict())


@pytest.mark.parametrize('method', ['cl', 'orepa', 'do', 'rep', 'repvgg'])
def test_what_is_written_to_an_offered_weight_is_taken(method):
    conv = nn.Conv2d(4, 6, 3).double()
    unit = ExpandedConv2d.from_conv(conv, 2, method)
    kernel = unit.weight.detach().clone()
    unit.offer_weight()
    nn.init.constant_(unit.bias, -4.6)
    unit.eval()(torch.randn(1, 4, 8, 8, dtype=torch.float64))
    torch.testing.assert_close(unit.bias, torch.full_like(unit.bias, -4.6))
    assert torch.equal(unit.weight, kernel)
    if method != 'repvgg':
        unit.offer_weight()
        unit.weight.data.fill_(0.5)
        torch.testing.assert_close(unit.to_conv().weight, torch.full_like(kernel, 0.5))
        torch.testing.assert_close(unit.bias, torch.full_like(unit.bias, -4.6))


@pytest.mark.parametrize('written', ['weight', 'bias', 'both'])
@pytest.mark.parametrize('method', ['cl', 'orepa', 'rep'])
def test_what_is_offered_is_taken_on_another_device(method, written, monkeypatch):
    """A model that a builder expands is moved to its GPU after it was written to."""
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())  # It knows no meta.
    unit = ExpandedConv2d.from_conv(nn.Conv2d(4, 6, 3), 2, method)
    unit.offer_weight()
    for kind in ('weight', 'bias') if written == 'both' else (written,):
        getattr(unit, kind).data.fill_(0.5)
    unit.to('meta')
    unit.take_offered()
    assert unit.weight.device.type == 'meta'


@pytest.mark.parametrize('method', ['cl', 'repvgg'])
def test_a_copy_takes_no_offered_values_after_its_factors_have_changed(method):
    """As the copy of EMAHook, whose factors are averaged through their data."""
    unit = ExpandedConv2d.from_conv(nn.Conv2d(4, 6, 3).double(), 2, method)
    trained = ExpandedConv2d.from_conv(nn.Conv2d(4, 6, 3).double(), 2, method)
    unit.offer_weight()
    for values in (unit.weight, unit.bias):
        values.data.fill_(0.5)
    average, other = copy.deepcopy(unit), copy.deepcopy(unit)
    torch.testing.assert_close(other.to_conv().bias, torch.full_like(unit.bias, 0.5))
    unit.bias.data.fill_(0.25)  # The original still offers its values.
    torch.testing.assert_close(unit.to_conv().bias, torch.full_like(unit.bias, 0.25))
    for mine, theirs in zip(average.parameters(), trained.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    for kind in ('weight', 'bias'):
        found, expected = (getattr(x.to_conv(), kind) for x in (average, trained))
        torch.testing.assert_close(found, expected)


def test_factors_have_the_layout_that_folding_multiplies():
    unit = ExpandedConv2d.from_conv(nn.Conv2d(4, 6, 3))
    unit(torch.randn(2, 4, 9, 9)).sum().backward()
    kernel = unit.factors[1].weight
    for tensor in (kernel, kernel.grad, copy.deepcopy(unit).double().factors[1].weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


@pytest.mark.parametrize('bias', [True, False])
def test_a_depthwise_kernel_does_not_change_the_memory_format(bias):
    conv = nn.Conv2d(6, 6, 3, groups=6, bias=bias)
    unit = ExpandedConv2d.from_conv(conv)
    x = torch.randn(2, 6, 9, 9)
    assert unit(x).stride() == conv(x).stride()


def test_fold_is_full_precision_under_autocast():
    unit = ExpandedConv2d.from_conv(nn.Conv2d(4, 6, 3))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(unit.weight, unit.fold()[0])
        assert unit.weight.dtype == torch.float32
        assert unit(torch.randn(1, 4, 8, 8)).dtype == torch.bfloat16
    assert torch.equal(unit.weight, ExpandedConv2d.fold(unit)[0])


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ('layer', 'words'),
    [
        (lambda: nn.ConvTranspose2d(4, 4, 3), 'not a Conv2d'),
        (lambda: nn.LazyConv2d(4, 3), 'first forward'),
        (lambda: OwnForward(4, 4, 3), 'forward of its own'),
        (lambda: weight_norm(nn.Conv2d(4, 4, 3)), 'reparametrised'),
        (lambda: ExpandedConv2d.from_conv(nn.Conv2d(4, 4, 3)), 'expanded already'),
        (lambda: torch.ao.nn.qat.Conv2d(4, 4, 3, qconfig=torch.ao.quantization.default_qconfig),
         'quantised'),
    ],
)  # fmt: skip
def test_what_cannot_be_expanded_is_refused(layer, words):
    with pytest.raises(TypeError, match=words):
        ExpandedConv2d.from_conv(layer())


@pytest.mark.parametrize(
    ('change', 'error', 'words'),
    [
        (dict(rate=0), ValueError, 'rate'),
        (dict(rate='4'), TypeError, 'rate'),
        (dict(rate=float('nan')), ValueError, 'rate'),
        (dict(method='cx'), ValueError, "'cl'"),
        (dict(method='ck'), ValueError, '3x3'),
        (dict(method='fc'), ValueError, 'linear'),
        (dict(init='zeros'), ValueError, 'preserve'),
        (dict(forward='fast'), ValueError, 'layerwise'),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    with pytest.raises(error, match=words):
        ExpandedConv2d.from_conv(nn.Conv2d(4, 4, 3), **change)


def test_a_known_wrapper_is_plain():
    with pytest.raises(TypeError):
        ExpandedConv2d.from_conv(OwnForward(4, 4, 3))
    PLAIN_LAYERS.add(OwnForward)
    try:
        assert type(ExpandedConv2d.from_conv(OwnForward(4, 4, 3)).to_conv()) is OwnForward
    finally:
        PLAIN_LAYERS.discard(OwnForward)
