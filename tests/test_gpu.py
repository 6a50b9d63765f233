"""Blocks, mixed precision and NCCL on a GPU: ``CUDA_VISIBLE_DEVICES=0 pytest tests/test_gpu.py``.

Other tests are run on the CPU everywhere."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

import mmexpand
from mmexpand import ExpandedConv2d
from mmexpand.core.capture import CapturedProduct
from mmexpand.mm.launch import build_runner
from mmexpand.surgery import named_units
from mmexpand.surgery.checkpoint import META_KEY, is_expanded_state_dict, load_checkpoint
from tests.processes import launch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
TRAIN = Path(__file__).parents[1] / 'tools' / 'train.py'
METHODS = ['cl', 'ck', 'orepa', 'do', 'ac', 'rep']
METHODS += ['bn', 'repvgg', 'qarepvgg', 'mobileone', 'acnet', 'dbb']


def error(value, reference):
    return float((value.cpu() - reference).abs().max())


def step(unit, x):
    """Output and gradients of one training step."""
    output = unit(x)
    parameters = list(unit.parameters())
    return [output.detach(), *torch.autograd.grad(output.square().sum(), parameters)]


@pytest.mark.parametrize('forward', ['folded', 'layerwise', 'auto'])
@pytest.mark.parametrize('method', METHODS)
def test_a_step_is_that_of_the_cpu(method, forward):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 5, padding=2, stride=2, groups=2).double()
    unit = ExpandedConv2d.from_conv(conv, 2, method=method, forward=forward)
    for parameter in unit.parameters():
        parameter.data.normal_()
    x = torch.randn(4, 4, 15, 14, dtype=torch.float64)
    there = copy.deepcopy(unit).cuda()
    results, references = step(there, x.cuda()), step(unit, x)
    # Of all: the gradients of what a norm undoes are rounding.
    largest = max(float(reference.abs().max()) for reference in references)
    for got, expected in zip(results, references, strict=True):
        assert got.is_cuda
        assert error(got, expected) < 1e-10 * largest
    unit, there = unit.eval(), there.eval()
    contracted = there.to_conv()
    assert contracted.weight.is_cuda
    reference = unit(x).detach()
    assert error(contracted(x.cuda()), reference) < 1e-10 * float(reference.abs().max())
    assert error(contracted(x.cuda()), conv(x)) > 0.1, 'nothing was trained'


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('accumulate', [1, 3])
def test_captured_folds_train_as_eager_ones(bias, accumulate):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.ReLU(), nn.Conv2d(8, 4, 3))]
    mmexpand.expand_(nets[0], mmexpand.ExpandConfig('cl', forward='folded'))
    nets = [nets[0].double().cuda(), copy.deepcopy(nets[0]).double().cuda()]
    for unit in named_units(nets[0]).values():
        unit.kernel.captures = True
    optimizers = [torch.optim.SGD(net.parameters(), 0.05, momentum=0.9) for net in nets]
    for step in range(6):
        batches = torch.randn(accumulate, 2, 3, 16, 16, dtype=torch.float64, device='cuda')
        for net, optimizer in zip(nets, optimizers, strict=True):
            if step == 3:  # In other memory: it is captured again.
                net.cpu().cuda()
            for x in batches:
                net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(
        isinstance(unit.kernel._chain_product(), CapturedProduct)
        for unit in named_units(nets[0]).values()
    )
    for ours, theirs in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


HOWS = [
    dict(method='cl', rate=2),
    dict(method='cl', rate=2, shortcut=True, init='preserve'),
    dict(method='orepa'),
    dict(method='repvgg', forward='folded'),
]


def hooks(how):
    return [dict(type='ExpandHook', include='backbone.encoder', **how), dict(type='ContractHook')]


class Start(Hook):
    """Keeps what training begins with."""

    def before_train_iter(self, runner, *_, **__):
        if runner.iter == 0:
            self.parameters = {k: v.clone() for k, v in runner.model.named_parameters()}


def check_compact(work_dir):
    """A compact checkpoint that was verified is there."""
    last = load_checkpoint(Path(work_dir) / 'compact_last.pth')
    assert not is_expanded_state_dict(last['state_dict'])
    assert 0 < last['meta'][META_KEY]['max_error'] < 1e-3


@pytest.mark.parametrize('how', HOWS, ids=str)
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_mixed_precision(seg_cfg, how, dtype):
    cfg = seg_cfg(custom_hooks=hooks(how))
    # Not the scale that GradScaler begins with, at which steps are left out.
    scale = dict(init_scale=256.0)
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype=dtype, loss_scale=scale)
    runner = build_runner(cfg, ('train', 'val'))
    start = Start()
    runner.register_hook(start)
    runner.train()
    assert named_units(runner.model)
    after = dict(runner.model.named_parameters())
    assert all(value.isfinite().all() for value in after.values())
    trained = [name for name, value in after.items() if value.requires_grad]
    assert all(not torch.equal(after[name], start.parameters[name]) for name in trained)
    check_compact(cfg.work_dir)


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('how', HOWS, ids=str)
def test_train_with_nccl(seg_cfg, tmp_path, how, amp):
    cfg = seg_cfg(custom_hooks=hooks(how))
    cfg.env_cfg = dict(dist_cfg=dict(backend='nccl'))
    cfg.dump(tmp_path / 'config.py')
    arguments = [tmp_path / 'config.py', '--launcher', 'pytorch'] + ['--amp'] * amp
    done = launch(TRAIN, *arguments)
    assert 'Distributed training: True' in done.stdout + done.stderr
    check_compact(cfg.work_dir)
