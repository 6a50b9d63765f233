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
