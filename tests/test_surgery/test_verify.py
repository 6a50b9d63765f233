"""A comparison that fails when it should."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import mmexpand
from mmexpand.surgery import VerificationError
from mmexpand.surgery.verify import full_precision, relative_errors


@pytest.fixture
def models():
    torch.manual_seed(0)
    expanded = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Dropout(0.5)
    )
    mmexpand.expand_(expanded, method='cl', init='default')
    return expanded, mmexpand.contract(expanded)


def forward(model):
    return dict(out=[model(torch.ones(1, 3, 8, 8))], size=8)


def test_equal_models_pass_and_are_left_as_they_were(models):
    expanded, compact = models
    expanded[1].eval()
    before = copy.deepcopy(expanded.state_dict())
    result = mmexpand.verify(expanded, compact, forward)
    assert result.max_error < 1e-5
    assert set(result.layers) == {'0', '3'}
    assert (expanded.training, expanded[1].training, compact.training) == (True, False, True)
    assert 'forward' not in vars(expanded[0])
    assert not expanded[0]._forward_hooks
    for name, value in expanded.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_worst_layer_is_named(models):
    expanded, compact = models
    with torch.no_grad():
        compact[3].weight[0, 0, 0, 0] += 1
    with pytest.raises(VerificationError, match='worst layer 3'):
        mmexpand.verify(expanded, compact, forward)
    assert 'forward' not in vars(expanded[0])


def test_errors_do_not_cancel_and_nan_does_not_pass(models):
    expanded, compact = models
    with torch.no_grad():
        compact[3].bias += torch.tensor([1.0, -1.0, 1.0, -1.0])
    with pytest.raises(VerificationError):
        mmexpand.verify(expanded, compact, forward)
    with torch.no_grad():
        compact[3].bias.fill_(float('nan'))
    with pytest.raises(VerificationError):
        mmexpand.verify(expanded, compact, forward)


def test_other_shapes_and_unreached_layers_are_refused(models):
    expanded, compact = models
    with pytest.raises(VerificationError, match='shape'):
        mmexpand.verify(
            expanded, compact, lambda m: m(torch.ones(1, 3, 8 if m is compact else 9, 8))
        )
    with pytest.raises(VerificationError, match='structure'):
        mmexpand.verify(
            expanded, compact, lambda m: [m(torch.ones(1, 3, 8, 8))] * (1 + (m is compact))
        )
    with pytest.raises(ValueError, match='no tensor'):
        mmexpand.verify(expanded, compact, lambda m: 'nothing')
    with pytest.raises(ValueError, match='no expanded layer'):
        mmexpand.verify(compact, compact, forward)


def test_layers_that_the_forward_pass_leaves_out_are_verified_too(models):
    expanded, compact = models
    x = torch.randn(2, 3, 8, 8)
    rng = torch.get_rng_state()
    result = mmexpand.verify(expanded, compact, lambda m: m[0](x), steps=[lambda m: m(x[:0])])
    assert torch.equal(rng, torch.get_rng_state())
    # The step gave an empty input to the layer, which proves nothing.
    assert result.how == {'0': 'in the model', '3': 'on random input'}
    result = mmexpand.verify(expanded, compact, lambda m: m[0](x), steps=[lambda m: m(x)])
    assert result.how == {'0': 'in the model', '3': 'on captured input'}
    assert 0 < result.layers['3'] < 1e-5


@pytest.mark.parametrize('steps', [[], [lambda m: m(torch.ones(1, 3, 8, 8))]])
def test_wrong_layers_are_all_named_wherever_they_were_verified(models, steps):
    expanded, compact = models
    with torch.no_grad():
        compact[0].weight += 1
        compact[3].weight += 1
    how = 'captured' if steps else 'random'
    with pytest.raises(VerificationError, match=r'2 of 2.*0 .*\(in the model\)') as caught:
        mmexpand.verify(expanded, compact, lambda m: m[0](torch.ones(1, 3, 8, 8)), steps=steps)
    assert f'(on {how} input)' in str(caught.value)


@pytest.mark.parametrize(
    'layer',
    [
        nn.Conv2d(4, 6, (1, 5), dilation=(1, 3), groups=2, stride=2),
        nn.Conv2d(4, 6, 3, padding='same', padding_mode='reflect'),
        nn.Linear(5, 7),
    ],
)
def test_any_layer_is_verified_on_random_input(layer):
    model = nn.ModuleList([layer, nn.Conv2d(3, 4, 3)]).double()
    mmexpand.expand_(model, mmexpand.ExpandConfig('cl+fc'))
    compact = mmexpand.contract(model)
    x = torch.ones(1, 3, 8, 8).double()
    result = mmexpand.verify(model, compact, lambda m: m[1](x))
    assert result.how['0'] == 'on random input'
    assert result.layers['0'] < 1e-12
    with torch.no_grad():
        compact[0].weight.view(-1)[-1] += 0.1
    with pytest.raises(VerificationError, match='worst layer 0'):
        mmexpand.verify(model, compact, lambda m: m[1](x))


class Selecting(nn.Module):
    """Returns other values for whatever of 64 near ties has the highest score."""

    def __init__(self, select):
        super().__init__()
        self.score = nn.Conv2d(3, 64, 1)
        self.select = select

    def forward(self, x):
        scores = self.score(x).mean((2, 3))
        values, indices = self.select(scores)
        return values, torch.arange(64.0)[indices]


@pytest.mark.parametrize(
    'select',
    [
        lambda s: s.topk(3),
        lambda s: torch.topk(s, k=3, dim=1),
        lambda s: s.sort(descending=True),
        lambda s: torch.sort(s, dim=-1, stable=True),
        lambda s: s.max(1),
        lambda s: torch.max(s, dim=1, keepdim=True),
        lambda s: (s, s.argsort(-1)),
        lambda s: (s, s.argmax(dim=1)),
    ],
)
def test_a_selection_that_rounding_turns_is_no_wrong_contraction(select):
    torch.manual_seed(0)
    model = Selecting(select)
    mmexpand.expand_(model, mmexpand.ExpandConfig(method='cl', init='preserve'))
    # All scores are the same to rounding, in the chain and in the product.
    same = nn.Conv2d(3, 64, 1)
    with torch.no_grad():
        same.weight[:] = same.weight[:1]
        same.bias[:] = same.bias[:1]
    model.score.set_weight(same.weight, same.bias)
    compact = mmexpand.contract(model)
    x = torch.randn(4, 3, 8, 8)

    def layerwise(m):
        scores = (m.score.forward_layerwise if m is model else m.score)(x).mean((2, 3))
        return m.select(scores)[1]

    assert not torch.equal(layerwise(model), layerwise(compact)), 'nothing was turned'
    assert mmexpand.verify(model, compact, lambda m: m(x)).max_error < 1e-4
    with torch.no_grad():
        compact.score.bias[5] += 1
    with pytest.raises(VerificationError, match='worst layer score'):
        mmexpand.verify(model, compact, lambda m: m(x))


class Drawing(nn.Conv2d):
    """Draws at random while it predicts, as SegNeXt's head does."""

    def forward(self, x):
        return super().forward(x) * torch.rand(8, 1, 1, device=x.device)


def test_what_a_network_draws_is_the_same_in_both():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Drawing(8, 8, 1))
    mmexpand.expand_(model, mmexpand.ExpandConfig(method='cl', include='0'))
    compact = mmexpand.contract(model)
    x = torch.randn(1, 3, 8, 8)
    before = torch.get_rng_state()
    assert mmexpand.verify(model, compact, lambda m: m(x)).max_error < 1e-5
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(model.eval()(x), model(x)), 'nothing was drawn'


def test_a_wrong_score_shows_before_a_selection():
    model = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)])
    mmexpand.expand_(model, method='cl')
    compact = mmexpand.contract(model)
    compact[1].bias.data[2] += 1
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(VerificationError, match='each of its 1 layers is equal'):
        mmexpand.verify(model, compact, lambda m: m[1](m[0](x)).mean((2, 3)).argmax(1).float())


def test_a_diverged_model_is_not_called_a_wrong_contraction(models):
    expanded, compact = models
    with torch.no_grad():
        expanded[3].factors[0].weight.fill_(float('inf'))
    with pytest.raises(VerificationError, match='not finite, in 3: training has diverged'):
        mmexpand.verify(expanded, compact, forward)


def test_a_units_own_forward_is_put_back(models):
    expanded, compact = models
    own = expanded[0].forward
    expanded[0].forward = own
    mmexpand.verify(expanded, compact, forward)
    assert vars(expanded[0])['forward'] is own


class Offsets(nn.Module):
    """A layer that starts at zero and adds to its input, as a deformable convolution does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        return x + self.conv(x)


def test_a_layer_that_starts_at_zero_is_compared_beyond_rounding():
    torch.manual_seed(0)
    model = Offsets()
    mmexpand.expand_(model, mmexpand.ExpandConfig(method='cl', rate=4, init='preserve'))
    compact = mmexpand.contract(model)
    images = torch.randn(2, 16, 12, 12)
    result = mmexpand.verify(model, compact, lambda m: m(images))
    assert 0 < result.layers['conv'] < 1e-6
    with torch.no_grad():
        compact.conv.weight *= 1.1
    with pytest.raises(VerificationError, match=r'worst layer conv 0\.1 '):
        mmexpand.verify(model, compact, lambda m: m(images))


def test_tf32_is_off_whichever_interface_has_set_it():
    matmul = torch.backends.cuda.matmul
    kept = matmul.fp32_precision
    try:
        matmul.fp32_precision = 'tf32'
        with full_precision():
            assert matmul.fp32_precision == 'ieee'
        assert matmul.fp32_precision == 'tf32'
    finally:
        matmul.fp32_precision = kept
    matmul.allow_tf32 = True
    with full_precision():
        assert not matmul.allow_tf32
    assert matmul.allow_tf32
    matmul.allow_tf32 = False


@pytest.mark.parametrize(
    'output', [lambda y: y > 0, lambda y: y.round().long(), lambda y: y.byte(), lambda y: y[:0]]
)
def test_outputs_without_values_to_compare_are_refused(models, output):
    with pytest.raises(ValueError, match='returned no tensor to compare'):
        mmexpand.verify(*models, lambda model: output(model(torch.ones(1, 3, 8, 8))))


def test_complex_outputs_are_compared(models):
    def spectrum(model):
        return torch.fft.fft2(model(torch.ones(1, 3, 8, 8)))

    assert mmexpand.verify(*models, spectrum)
    nn.init.normal_(models[1][0].bias)
    with pytest.raises(VerificationError):
        mmexpand.verify(*models, spectrum)


class Sorting(nn.Module):
    """Sorts the scores above a threshold, or masked scores."""

    def __init__(self, masked):
        super().__init__()
        self.conv, self.masked = nn.Conv2d(3, 4, 3), masked

    def forward(self, x):
        scores = self.conv(x).flatten()
        kept = scores.new_full((5,), -torch.inf) if self.masked else scores[scores > 100]
        return scores, kept.sort().indices


@pytest.mark.parametrize('masked', [True, False])
def test_a_selection_without_finite_scores_is_equal(masked):
    expanded = Sorting(masked)
    mmexpand.expand_(expanded, method='cl')
    compact = mmexpand.contract(expanded)
    images = torch.randn(1, 3, 8, 8)
    assert mmexpand.verify(expanded, compact, lambda model: model(images)).max_error < 1e-5


def test_a_layer_that_no_batch_reaches_may_pad_by_reflection():
    expanded = nn.ModuleList(
        [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=20, padding_mode='reflect')]
    )
    mmexpand.expand_(expanded, method='cl')
    images = torch.randn(1, 3, 8, 8)
    result = mmexpand.verify(expanded, mmexpand.contract(expanded), lambda model: model[0](images))
    assert set(result.layers) == {'0', '1'}


def test_outputs_in_subclasses_of_dicts_are_compared():
    class Outputs(dict):
        pass

    right = torch.ones(2)
    outputs = OrderedDict(a=right), Outputs(seg=[right])
    assert relative_errors(outputs, outputs) == [0.0, 0.0]
    assert relative_errors(outputs, (outputs[0], Outputs(seg=[right + 5]))) == [0.0, 5.0]
