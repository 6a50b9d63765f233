"""Kernels folded once per optimizer step: as often as needed, exactly, in few operations."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmexpand
from mmexpand import ExpandConfig, ExpandedConv2d, ExpandedLinear
from mmexpand.core.folded import FoldedKernel
from mmexpand.core.folded_parameter import FoldedParameter


def unit_of(kernel=3, bias=True, inputs=4, outputs=6, method='cl', **how):
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=1, bias=bias).double()
    return ExpandedConv2d.from_conv(conv, 3, method, forward='folded', **how)


def steps(tensor):
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('sizes', [(4, 6), (6, 4)])  # Different pairs are multiplied first.
@pytest.mark.parametrize('kernel', [3, (1, 2), 1])
def test_the_product_and_its_gradients_are_those_of_the_algebra(kernel, sizes, bias):
    unit = unit_of(kernel, bias, *sizes)
    assert unit.kernel._chain_product() is not None
    reference = unit.fold()
    affine = unit.kernel.get()
    gradients = [torch.randn_like(value) for value in reference if value is not None]
    parameters = list(unit.parameters())
    found = []
    for values in (affine, reference):
        values = [value for value in values if value is not None]
        found.append(torch.autograd.grad(values, parameters, gradients))
    for ours, theirs in zip(affine, reference, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for ours, theirs, parameter in zip(*found, parameters, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        # A fused optimizer reads memory as it lies.
        assert steps(ours) == steps(parameter)


def test_the_product_of_linear_layers():
    torch.manual_seed(0)
    unit = ExpandedLinear.from_linear(nn.Linear(5, 7).double(), 2, forward='folded')
    layerwise = copy.deepcopy(unit)
    x = torch.randn(3, 5, dtype=torch.float64)
    unit(x).square().sum().backward()
    layerwise.forward_layerwise(x).square().sum().backward()
    assert unit.kernel._chain_product() is not None
    for ours, theirs in zip(unit.parameters(), layerwise.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('method', ['cl', 'do'])
def test_micro_batches_share_one_fold(method, monkeypatch):
    folds = []
    fold = FoldedKernel.fold
    monkeypatch.setattr(FoldedKernel, 'fold', lambda self: folds.append(self) or fold(self))
    unit, whole = unit_of(method=method), unit_of(method=method)
    optimizer = torch.optim.SGD(unit.parameters(), 0.1, fused=True)
    batches = torch.randn(4, 2, 4, 8, 8, dtype=torch.float64)
    for step in range(1, 3):
        for batch in batches:
            unit(batch).square().sum().backward()
        assert len(folds) == step
        optimizer.step()
        if step == 1:
            whole(batches.flatten(0, 1)).square().sum().backward()
            for ours, theirs in zip(unit.parameters(), whole.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
            folds.pop()
        optimizer.zero_grad()


@pytest.mark.parametrize('method', ['cl', 'do'])
def test_a_loop_that_writes_to_data_sees_the_written_factors(method):
    unit = unit_of(method=method)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    for _ in range(3):
        output = unit(x)
        torch.testing.assert_close(output, unit.forward_layerwise(x), rtol=1e-12, atol=1e-12)
        output.square().mean().backward()
        for parameter in unit.parameters():
            parameter.data.sub_(parameter.grad)
        unit.zero_grad()
    assert not torch.allclose(unit(x), output)


@pytest.mark.parametrize('method', ['cl', 'do'])
def test_hooks_of_a_factor_run_once(method):
    unit = unit_of(method=method)
    calls = []
    parameter = next(unit.parameters())
    parameter.register_hook(lambda gradient: calls.append(gradient) or 2 * gradient)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    unit(x).sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(parameter.grad, 2 * calls[0])


@pytest.mark.parametrize('method', ['cl', 'do'])
def test_a_factor_changed_before_the_backward_pass_is_an_error(method):
    unit = unit_of(method=method)
    loss = unit(torch.randn(1, 4, 6, 6, dtype=torch.float64)).sum()
    with torch.no_grad():
        next(unit.parameters()).add_(1)
    with pytest.raises(RuntimeError, match='in place'):
        loss.backward()


@pytest.mark.parametrize('method', ['cl', 'do'])
def test_nothing_is_left_of_a_unit(method):
    unit = unit_of(method=method)
    unit(torch.randn(1, 4, 6, 6, dtype=torch.float64)).sum().backward()
    parameter = weakref.ref(next(unit.parameters()))
    del unit
    gc.collect()
    assert parameter() is None


def test_frozen_factors_get_no_gradient():
    for method in ('cl', 'do'):
        unit = unit_of(method=method)
        frozen = next(unit.parameters()).requires_grad_(False)
        unit(torch.randn(1, 4, 6, 6, dtype=torch.float64)).sum().backward()
        assert frozen.grad is None
        assert all(p.grad is not None for p in unit.parameters() if p.requires_grad)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(method):
    """Operations of a training step of YOLO-LITE's layers but for the optimizer's."""
    torch.manual_seed(0)
    layers, inputs = [], 3
    for outputs in (16, 32, 64, 128, 128):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(0.1), nn.MaxPool2d(2)]
        inputs = outputs
    model = nn.Sequential(*layers)
    if method:
        mmexpand.expand_(model, ExpandConfig(method, forward='folded'))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x = torch.randn(16, 3, 96, 96)
    for _ in range(2):
        optimizer.zero_grad()
        with Operations() as counted:
            model(x).square().mean().backward()
        optimizer.step()
    return counted.count


@pytest.mark.parametrize(('method', 'most'), [('cl', 35)])
def test_operations_that_a_unit_adds_to_a_step(method, most):
    """Views included; on a GPU each of them costs as much as a product."""
    added = (operations(method) - operations(None)) / 5
    assert 10 < added <= most


@pytest.mark.parametrize(
    ('method', 'kernel', 'groups'), [('cl', 3, 1), ('cl', 3, 2), ('ck', 5, 1), ('ck', 7, 4)]
)
def test_leaves_deliver_the_same_gradients(method, kernel, groups):
    """Under DDP the network runs on folded parameters, whose gradients are reduced."""
    conv = nn.Conv2d(8, 12, kernel, groups=groups).double()
    folded = ExpandedConv2d.from_conv(conv, 4, method, forward='folded')
    unit = copy.deepcopy(folded)
    unit.folded_parameter = FoldedParameter(unit.kernel, unit.take_offered)
    x = torch.randn(2, 8, 12, 12, dtype=torch.float64)
    for _ in range(2):  # the second adds to the first
        folded(x).square().sum().backward()
        unit(x).square().sum().backward()
        assert unit.folded_parameter.weight.grad is not None
        unit.folded_parameter.deliver()
    for ours, theirs in zip(unit.factors.parameters(), folded.factors.parameters(), strict=True):
        assert theirs.grad.abs().max() > 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
        assert steps(ours.grad) == steps(ours)


def test_frozen_norms_train_the_layer_that_is_deployed():
    unit = unit_of(method='repvgg', inputs=6)
    x = torch.randn(4, 6, 8, 8, dtype=torch.float64)
    unit(x)
    before = {k: v.clone() for k, v in unit.state_dict().items() if 'running' in k}
    measured = unit(x)
    assert not torch.equal(before['repvgg.0.norm.running_var'], unit.repvgg[0].norm.running_var)
    unit.freeze_norms()
    unit.train()
    optimizer = torch.optim.SGD(unit.parameters(), 0.01)
    before = {k: v.clone() for k, v in unit.state_dict().items() if 'running' in k}
    for _ in range(3):
        output = unit(x)
        torch.testing.assert_close(output, unit.to_conv()(x), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(output, measured)
        optimizer.zero_grad()
        output.square().mean().backward()
        assert all(p.grad is not None for p in unit.parameters() if p.requires_grad)
        optimizer.step()
    assert all(torch.equal(unit.state_dict()[k], v) for k, v in before.items())


def test_a_kept_kernel_holds_the_memory_of_the_factors():
    unit = unit_of().eval()
    unit.kernel.get()
    before = {parameter.data_ptr() for parameter in unit.parameters()}
    for parameter in unit.parameters():
        parameter.data = parameter.data + 1
    assert {storage.data_ptr() for _, storage in unit.kernel._kept.held} == before
    assert before.isdisjoint(parameter.data_ptr() for parameter in unit.parameters())


def test_a_parametrised_factor_has_its_own_gradient():
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    unit = unit_of(bias=False)
    nn.utils.parametrize.register_parametrization(unit.factors[1], 'weight', Half())
    layerwise = copy.deepcopy(unit)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for _ in range(2):
        for model, run in ((unit, unit), (layerwise, layerwise.forward_layerwise)):
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            run(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(unit.parameters(), layerwise.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_inference_mode_leaves_a_kernel_for_gradients_of_the_input():
    unit = unit_of().eval().requires_grad_(False)
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        expected = unit(x)
    output = unit(x)
    output.sum().backward()
    assert torch.equal(output, expected.clone()) and x.grad.abs().max() > 0


def test_maps_of_two_sizes_in_one_step_with_norms_in_eval_mode():
    """The small one runs layerwise, between the forward and backward pass of the large one."""
    unit = unit_of(method='repvgg', inputs=6, bias=False)
    for norm in unit._norms:
        norm.norm.running_mean.normal_()
    unit.freeze_norms()
    unit.forward_order = 'auto'
    images = [torch.randn(1, 6, size, size, dtype=torch.float64) for size in (32, 1)]
    compact = unit.to_conv()
    sum(unit(image).sum() + unit.forward_layerwise(image).sum() for image in images).backward()
    for image in images:
        for run in (unit, unit.forward_layerwise):
            torch.testing.assert_close(run(image), compact(image), rtol=1e-10, atol=1e-12)


def test_frozen_after_compact_gradients_were_set_up():
    unit = unit_of()
    unit.folded_parameter = FoldedParameter(unit.kernel, unit.take_offered)
    unit.requires_grad_(False)
    unit.folded_parameter.weight.grad = torch.ones_like(unit.folded_parameter.weight)
    unit.folded_parameter.deliver()
    assert unit.folded_parameter.weight.grad is None
    assert all(parameter.grad is None for parameter in unit.parameters())


def test_an_unbatched_image_runs_as_layerwise_does():
    unit = unit_of(method='repvgg', inputs=6).float()
    with pytest.raises(ValueError, match='expected 4D input'):
        unit(torch.randn(6, 32, 32))


def test_a_rate_of_numpy():
    numpy = pytest.importorskip('numpy')
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 4, 2))
    x = torch.randn(1, 4, 8, 8)
    expected = net(x)
    mmexpand.expand_(net, method='cl', rate=numpy.float32(2.5))
    torch.testing.assert_close(net.eval()(x), expected, rtol=1e-4, atol=1e-5)


class TestStartOfNorms:
    def given(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).double()
        expanded = copy.deepcopy(net)
        mmexpand.expand_(expanded, method='repvgg')
        return net, expanded, torch.randn(4, 4, 16, 16, dtype=torch.float64)

    def test_a_state_dict_before_the_first_batch_keeps_the_given_weights(self):
        net, expanded, x = self.given()
        loaded = copy.deepcopy(expanded)
        loaded.load_state_dict(expanded.state_dict())
        torch.testing.assert_close(loaded.train()(x), net(x), rtol=1e-10, atol=1e-12)

    def test_a_trained_state_dict_keeps_its_statistics(self):
        _, expanded, x = self.given()
        fresh = copy.deepcopy(expanded)
        optimizer = torch.optim.SGD(expanded.train().parameters(), 0.1)
        for _ in range(3):
            expanded(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        fresh.load_state_dict(expanded.state_dict())
        assert torch.equal(fresh.train()(x + 1), expanded(x + 1))
        assert all(norm.is_anchored for norm in fresh[0]._norms)

    @pytest.mark.parametrize('value', [0.0, 0.3])
    @pytest.mark.parametrize('forward', ['folded', 'layerwise'])
    @pytest.mark.parametrize('method', ['repvgg', 'dbb', 'bn'])
    def test_constant_batches_leave_the_given_weights(self, method, forward, value):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(4, 4, 3))
        expanded = copy.deepcopy(net)
        mmexpand.expand_(expanded, method=method, forward=forward)
        x = torch.randn(4, 4, 16, 16)
        for _ in range(20):
            constant = torch.full_like(x, value)
            output = expanded.train()(constant)
            torch.testing.assert_close(output, net(constant), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(expanded.eval()(x), net(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(expanded.train()(x), net(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize('forward', ['auto', 'layerwise'])
    def test_a_compiled_network_starts_from_the_given_weights(self, forward):
        net, expanded, x = self.given()
        expanded[0].forward_order = forward
        compiled = torch.compile(expanded.train(), backend='eager')
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('forward', ['folded', 'layerwise'])
@pytest.mark.parametrize('method', ['bn', 'repvgg', 'dbb', 'cl'])
def test_a_frozen_layer_stays_as_it_was_given(method, forward):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)).double()
    model[0].weight.requires_grad_(False)  # The bias is trained.
    given = copy.deepcopy(model)
    mmexpand.expand_(model, method=method, forward=forward, rate=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        x, target = torch.randn(2, 4, 6, 8, 8).double()
        (model(x) - target.exp()).square().mean().backward()
        optimizer.step()
    compact = mmexpand.contract(model)
    torch.testing.assert_close(compact[0].weight, given[0].weight, rtol=1e-10, atol=1e-12)
    assert not compact[0].weight.requires_grad
    assert not torch.allclose(compact[0].bias, given[0].bias)
    assert not torch.allclose(compact[1].weight, given[1].weight)
    if method != 'cl':
        assert not model[0].takes_statistics and model[1].takes_statistics
        model[0].requires_grad_(True)
        assert model.train()[0].takes_statistics


def test_tensors_in_the_place_of_the_parameters_get_the_gradient():
    """They share the parameters' memory."""
    unit = unit_of()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for training in (True, False):
        unit.train(training)
        unit(x)
        given = {k: v.detach().requires_grad_() for k, v in unit.named_parameters()}
        torch.func.functional_call(unit, given, (x,)).sum().backward()
        assert all(tensor.grad is not None for tensor in given.values())
        assert all(parameter.grad is None for parameter in unit.parameters())


@pytest.mark.parametrize('method', ['bn', 'repvgg'])
@pytest.mark.parametrize('forward', ['folded', 'layerwise'])
@pytest.mark.parametrize('bias', [True, False])
def test_anchoring_after_training_keeps_the_function(method, forward, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, bias=bias).double()
    unit = ExpandedConv2d.from_conv(conv, 1, method, forward=forward, init='preserve')
    optimizer = torch.optim.SGD(unit.parameters(), 0.05)
    constant = torch.ones(4, 6, 12, 12, dtype=torch.float64)
    for _ in range(5):
        optimizer.zero_grad()
        unit(constant).square().mean().backward()
        optimizer.step()
    assert not unit.is_anchored
    compact = unit.to_conv()
    assert not torch.allclose(compact.weight, conv.weight)
    x = torch.randn(4, 6, 12, 12, dtype=torch.float64)
    unit.anchor_norms(x)
    assert unit.is_anchored
    torch.testing.assert_close(unit.to_conv()(x), compact(x), rtol=1e-10, atol=1e-10)


def test_synchronised_norms_run_layerwise():
    """Only their own forward pass pools statistics over processes."""
    unit = unit_of(method='repvgg', inputs=6)
    x = torch.randn(4, 6, 16, 16, dtype=torch.float64)
    assert unit._sample(x) is not None
    assert nn.SyncBatchNorm.convert_sync_batchnorm(unit)._sample(x) is None


def test_a_folded_parameter_is_not_written_between_forward_and_backward():
    unit = unit_of()
    unit.folded_parameter = FoldedParameter(unit.kernel, unit.take_offered)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    first = unit(x)
    with torch.no_grad():
        unit.eval()(x)
    other = nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    torch.optim.SGD([other], 0.1).step()
    (first.sum() + unit.train()(x).sum()).backward()
    expected = unit.to_conv()
    expected(x.detach()).sum().backward()
    torch.testing.assert_close(unit.folded_parameter.weight.grad, 2 * expected.weight.grad)


@pytest.mark.parametrize(('groups', 'folds'), [(1, False), (32, True)])
def test_auto_folds_a_depthwise_layer_with_few_pixels(groups, folds):
    conv = nn.Conv2d(32, 32, 3, padding=1, groups=groups)
    unit = ExpandedConv2d.from_conv(conv, 1, 'repvgg', forward='auto')
    assert (unit._sample(torch.randn(8, 32, 3, 4)) is not None) == folds
