"""Fake quantisation computes what ONNX Runtime's int8 file computes."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip('mmengine')
pytest.importorskip('onnxruntime')
from mmengine.model import BaseModel
from torch import nn

import mmexpand
from mmexpand.deploy import Int8, export_onnx, onnxruntime_run
from mmexpand.surgery import named_units
from mmexpand.surgery.fake_quantisation import RECTIFIED, FakeQuantisation, fake_quantised

GIVEN = [torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(i)) for i in range(4)]


class Net(BaseModel):
    """All ways in which convolutions, norms and activations follow each other."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)  # reads what a layer gives
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right, self.right_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)  # what left reads
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        x = self.relu(self.stem_norm(self.stem(inputs)))
        x = self.relu(self.pointwise(self.depthwise(x)))
        y = self.relu(x + self.left(x) + self.right_norm(self.right(x)))
        x, y = self.relu(self.shared(x)), self.relu(self.shared(y))
        return self.head(torch.cat([x, 0.1 * y], 1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.add_(0.1 * torch.rand_like(value))
    return net.eval()


@torch.no_grad()
def ranges_of(net):
    fake = FakeQuantisation(net, 'x86-vnni')
    for image in GIVEN:
        net(image)
        fake.step()
    fake.observe(False)
    fake.start()
    found = fake.ranges()
    fake.remove()
    return found


@torch.no_grad()
def trained(net, ranges):
    with fake_quantised(net, 'x86-vnni', ranges, lambda: net(GIVEN[0])):
        return net(GIVEN[0])


def in_int8(net, ranges, tmp_path, keep=()):
    path = tmp_path / 'int8.onnx'
    options = Int8(GIVEN, keep=keep, target='x86-vnni', ranges=ranges)
    report = export_onnx(net, GIVEN[0], path, raw=True, int8=options)
    return report, torch.from_numpy(onnxruntime_run(path)(GIVEN[0].numpy())[0])


def compare(found, expected, ranges):
    """Ties may be rounded the other way: by one step of the last layer, in few places."""
    low, high = ranges['head']['output']
    steps = (found - expected).abs() * 255 / (high - low)
    assert steps.max() < 1.01
    assert (steps > 0.01).double().mean() < 0.002


def test_onnxruntime_computes_what_pytorch_does_fake_quantised(net, tmp_path):
    before = net(GIVEN[0])
    ranges = ranges_of(net)
    assert len(ranges) == 7
    expected = trained(net, ranges)
    report, found = in_int8(net, ranges, tmp_path)
    assert report.int8.kept == ()
    compare(found, expected, ranges)
    # Something was rounded, in every layer, and nothing is left of it.
    assert torch.equal(net(GIVEN[0]), before)
    assert (expected - before).abs().max() > 0.01 * before.abs().max()
    for name in ranges:
        fewer = {key: value for key, value in ranges.items() if key != name}
        assert not torch.equal(trained(net, fewer), expected), name


def test_other_ranges_give_another_file(net, tmp_path):
    ranges = ranges_of(net)
    smaller = copy.deepcopy(ranges)
    smaller['shared'][RECTIFIED][1] /= 2
    _, found = in_int8(net, smaller, tmp_path)
    compare(found, trained(net, smaller), ranges)
    assert (found - in_int8(net, ranges, tmp_path)[1]).abs().max() > 0.05
    compare(trained(net, ranges), in_int8(net, ranges, tmp_path)[1], ranges)


def test_the_range_of_an_output_is_that_behind_a_relu_in_place(net):
    ranges = ranges_of(net)
    rectified = {name for name, found in ranges.items() if RECTIFIED in found}
    assert rectified == {'stem', 'pointwise', 'shared'}
    assert all(abs(ranges[name][RECTIFIED][0]) < 1e-30 for name in rectified)
    # Other modules may read the values before a ReLU that is not in place.
    net.relu.inplace = False
    ranges = ranges_of(net)
    assert all(ranges[name]['output'][0] < 0 for name in rectified)


def test_relus_that_are_not_in_place_or_read_before(net, tmp_path):
    """The file is what was trained in both cases."""
    net.relu.inplace = False
    ranges = ranges_of(net)
    compare(in_int8(net, ranges, tmp_path)[1], trained(net, ranges), ranges)
    net.relu.inplace = True
    net.forward = lambda inputs, **_: net.head(read_before(net, net.stem(inputs)))
    ranges = ranges_of(net)
    assert RECTIFIED in ranges['stem']
    report, found = in_int8(net, ranges, tmp_path)
    assert report.int8.kept == ('stem',)
    without = {name: found for name, found in ranges.items() if name != 'stem'}
    compare(found, trained(net, without), ranges)


def read_before(net, x):
    mean = x.mean((2, 3), keepdim=True)
    x = net.relu(x)
    return torch.cat([x, x + mean], 1)


def test_a_relu_behind_some_calls_only(net):
    plain = net.shared
    net.forward = lambda inputs, **_: net.head(
        torch.cat([net.relu(plain(net.stem(inputs))), plain(net.stem(inputs))], 1)
    )
    assert RECTIFIED not in ranges_of(net)['shared']


def test_layers_without_ranges_and_kept_ones_stay_float(net, tmp_path):
    ranges = ranges_of(net)
    del ranges['head']
    report, _ = in_int8(net, ranges, tmp_path, keep=['stem'])
    assert report.int8.kept == ('stem', 'head')
    assert report.max_error < 0.02  # of PyTorch's outputs, fake-quantised but for these


def test_a_unit_is_its_folded_kernel(net):
    compact = trained(net, ranges_of(net))
    expanded = copy.deepcopy(net).train()
    mmexpand.expand_(expanded, include=['left', 'stem'], method='repvgg', init='preserve')
    expanded(torch.cat(GIVEN))
    for unit in named_units(expanded).values():
        unit.freeze_norms()
    # Training mode, but for norms: what is trained is the compact network, fake-quantised.
    for norm in (expanded.stem_norm, expanded.right_norm):
        norm.eval()
    contracted = mmexpand.contract(expanded).eval()
    ranges = ranges_of(contracted)
    with fake_quantised(expanded, 'x86-vnni', ranges, lambda: expanded(GIVEN[0])):
        assert expanded.left.forward_order == 'folded'
        found = expanded(GIVEN[0])
        found.square().mean().backward()
    gradients = [p.grad for unit in named_units(expanded).values() for p in unit.parameters()]
    assert sum(g is not None and g.abs().sum() > 0 for g in gradients) >= 8
    assert expanded.left.forward_order == 'auto'
    expected = trained(contracted, ranges)
    steps = (found - expected).abs() * 255 / np.subtract(*ranges['head']['output'][::-1])
    assert steps.max() < 1.5
    assert (steps > 0.5).double().mean() < 0.02
    assert not torch.equal(compact, expected)


def test_gradients_of_merged_norms_are_those_of_the_float_network(net):
    ranges = ranges_of(net)
    gradients = []
    for quantised in (False, True):
        net.zero_grad()
        if quantised:
            with fake_quantised(net, 'x86-vnni', ranges, lambda: net(GIVEN[0])):
                net(GIVEN[0]).square().mean().backward()
        else:
            net(GIVEN[0]).square().mean().backward()
        gradients.append(torch.cat([net.stem_norm.weight.grad, net.stem.weight.grad.flatten()]))
    float_, rounded = gradients
    assert not torch.equal(float_, rounded)
    assert torch.nn.functional.cosine_similarity(float_, rounded, dim=0) > 0.99


def test_a_layer_with_a_norm_for_each_level_stays_float(net):
    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

        def forward(self, x):
            return [norm(self.conv(x)) for norm in self.norms]

    levels = Levels().eval()
    fake = FakeQuantisation(levels, 'arm')
    levels(GIVEN[0])
    fake.step()
    fake.start()
    assert fake.layers == {}


def test_an_unknown_target_is_refused(net):
    with pytest.raises(ValueError, match=r"target must be one of 'x86', .*got 'avx'"):
        FakeQuantisation(net, 'avx')


def test_all_readers_of_an_input_observe_it(net):
    fake = FakeQuantisation(net, 'x86-vnni')
    for factor in (1, 3):
        fake.observe(True)
        with torch.no_grad():
            net.stem_norm.weight.mul_(factor)
            net(GIVEN[0])
        fake.step()
        if factor == 1:
            fake.start()
    ranges = fake.ranges()
    fake.remove()
    assert ranges['left']['input'] == ranges['right']['input']
    assert ranges['left']['input'][1] > 0


@pytest.mark.parametrize('bad', [float('inf'), float('nan')])
def test_a_value_that_is_not_finite_leaves_the_ranges(net, bad):
    """As an overflow in half precision, whose step is skipped."""
    fake = FakeQuantisation(net, 'x86-vnni')
    with torch.no_grad():
        net(GIVEN[0])
        fake.step()
        before = fake.ranges()
        net(torch.full_like(GIVEN[0], bad))
        fake.step()
    assert fake.ranges() == before
    fake.remove()


@torch.no_grad()
def test_a_layer_without_data_at_first_stays_float_until_it_has_some(net):
    expected = net(GIVEN[0])
    fake = FakeQuantisation(net, 'x86-vnni')
    net(GIVEN[0][:0])
    fake.step()
    fake.start()
    assert fake.ranges() == {}
    assert torch.equal(net(GIVEN[0]), expected)
    fake.step()
    fake.observe(False)
    assert fake.ranges().keys() == fake.layers.keys()
    error = (net(GIVEN[0]) - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.1
    fake.remove()
