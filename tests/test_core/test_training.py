"""Every order of association trains the same network: float64, and each of PyTorch's modes."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmexpand
from mmexpand import ExpandConfig, ExpandedConv2d

FORWARDS = ['layerwise', 'folded', 'auto']


def net(forward, method='cl'):
    """Wide images in front and few pixels behind: 'auto' decides differently for the two."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 5, padding=2, stride=2),
        nn.ReLU(),
        nn.Conv2d(4, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Conv2d(16, 32, 2),
        nn.Flatten(),
        nn.Linear(32, 5),
    ).double()
    mmexpand.expand_(model, ExpandConfig(method, 2, init='default', forward=forward))
    return model


def train(model, steps=20, run=None, accumulate=1, **sgd):
    torch.manual_seed(1)
    run = run or model
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, **sgd)
    losses = []
    for _ in range(steps):
        for _ in range(accumulate):
            loss = (run(torch.randn(2, 3, 32, 32, dtype=torch.float64)) - 1).square().mean()
            (loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0], 'nothing was learnt'
    return losses


@pytest.fixture(scope='module')
def reference():
    return train(net('layerwise'))


@pytest.mark.parametrize('forward', FORWARDS)
def test_losses_are_equal(forward, reference):
    assert train(net(forward)) == pytest.approx(reference, rel=1e-10)


@pytest.mark.parametrize('method', ['ck', 'cl+fc', 'ck+fc', 'auto'])
def test_losses_are_equal_for_every_method(method):
    layerwise = train(net('layerwise', method))
    for forward in FORWARDS[1:]:
        assert train(net(forward, method)) == pytest.approx(layerwise, rel=1e-10)


@pytest.mark.parametrize('forward', FORWARDS)
def test_activation_checkpointing(forward, reference):
    model = net(forward)
    losses = train(model, run=lambda x: checkpoint(model, x, use_reentrant=False))
    assert losses == pytest.approx(reference, rel=1e-10)


@pytest.mark.parametrize('method', ['cl', 'ck'])
def test_fused_optimizer(method):
    """On a CPU it takes memory as it lies: a gradient laid out unlike its factor is misread."""
    layerwise = train(net('layerwise', method), foreach=False)
    for forward in FORWARDS:
        losses = train(net(forward, method), fused=True)
        assert losses == pytest.approx(layerwise, rel=1e-10)


def test_gradient_accumulation():
    layerwise = train(net('layerwise'), accumulate=3)
    for forward in FORWARDS[1:]:
        assert train(net(forward), accumulate=3) == pytest.approx(layerwise, rel=1e-10)


def test_channels_last(reference):
    model = net('auto').to(memory_format=torch.channels_last)
    losses = train(model, run=lambda x: model(x.to(memory_format=torch.channels_last)))
    assert losses == pytest.approx(reference, rel=1e-10)


def test_a_copy_made_in_the_middle_goes_its_own_way():
    model = net('auto')
    train(model, 2)
    average = copy.deepcopy(model)
    before = copy.deepcopy(average.state_dict())
    train(model, 20)
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
    assert not torch.equal(model[0].weight, average[0].weight)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('forward', ['folded', 'auto'])
def test_autocast_rounds_the_product_once(dtype, forward):
    model = net(forward).float()
    compact = mmexpand.contract(model)
    x = torch.randn(2, 3, 32, 32)
    exact = model(x)
    model.requires_grad_(True)
    with torch.autocast('cpu', dtype=dtype):
        ours, theirs = model(x), compact(x)
    assert ours.dtype == dtype
    error = (theirs.float() - exact).abs().max()
    assert error > 0
    # The compact network, run in this precision, is as far from the exact result.
    assert (ours.float() - exact).abs().max() < 3 * error
    ours.float().square().mean().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_auto_is_the_cheaper_of_both():
    unit = ExpandedConv2d.from_conv(nn.Conv2d(16, 16, 3))
    for size, folded in ((64, True), (3, False)):
        x = torch.randn(1, 16, size, size)
        costs = [unit.count_macs(x.shape, folded=each) for each in (True, False)]
        assert (costs[0] < costs[1]) is folded
        unit.kernel.forget()
        unit(x)
        assert (unit.kernel._kept is not None) is folded


def test_compiled_training_step():
    """In a process of its own: the compiler starts threads that outlive a test."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_training import net, train
model = net('auto')[:3]
compiled = train(model, run=torch.compile(model))
eager = train(net('auto')[:3])
assert max(abs(a - b) for a, b in zip(compiled, eager)) < 1e-12, (compiled, eager)
print('equal')
"""
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith('equal'), done.stderr[-3000:]
