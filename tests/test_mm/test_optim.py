"""Options per parameter follow the layer; multipliers follow the factor's role."""

import copy

import pytest
import torch
from mmengine.optim import AmpOptimWrapper, build_optim_wrapper
from torch import nn

import mmexpand
from mmexpand import ExpandConfig
from mmexpand.mm.optim import by_layer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x):
        return self.conv2(self.depthwise(self.norm(self.conv1(x)).relu()))


def options(model, cfg):
    """Learning rate and decay of every parameter, by name."""
    wrapper = build_optim_wrapper(model, cfg)
    held = {
        id(p): (group['lr'], group['weight_decay'])
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }
    return {name: held[id(p)] for name, p in model.named_parameters() if id(p) in held}


def sgd(**paramwise):
    return dict(
        type='OptimWrapper',
        optimizer=dict(type='SGD', lr=1.0, momentum=0.9, weight_decay=0.1),
        paramwise_cfg=paramwise,
    )


@pytest.mark.parametrize('how', [dict(method='cl'), dict(method='orepa'), dict(method='repvgg')])
@pytest.mark.parametrize(
    'paramwise',
    [
        dict(custom_keys={'conv1.weight': dict(lr_mult=0.5), 'conv2': dict(decay_mult=0.0)}),
        dict(dwconv_decay_mult=0.25, norm_decay_mult=0.5),
        dict(bias_lr_mult=2.0, bias_decay_mult=0.0),
        {},
    ],
)
def test_options_of_the_compact_parameter_apply_to_all_that_stands_for_it(how, paramwise):
    compact, expanded = Net(), Net()
    mmexpand.expand_(expanded, ExpandConfig(**how))
    expected = options(compact, sgd(**paramwise))
    found = options(expanded, by_layer(sgd(**paramwise)))
    trained = {name for name, p in expanded.named_parameters() if p.requires_grad}
    assert trained <= set(found)
    for name in trained:
        layer = name.partition('.')[0]
        kind = 'bias' if name.endswith('bias') else 'weight'
        lr, decay = expected[f'{layer}.{kind}']
        scale = layer != 'norm' and ('.scale' in name or '.norm.' in name)
        assert found[name] == (lr, 0.0 if scale else decay), name


def test_multipliers_follow_the_role():
    model = Net()
    mmexpand.expand_(model, ExpandConfig('cl', include='conv1', shortcut=True))
    cfg = by_layer(sgd(outer_lr_mult=0.1, inner_lr_mult=0.5, scale_lr_mult=2.0))
    found = options(model, cfg)
    inside = 'conv1.cl'
    assert found[f'{inside}.0.node.0.weight'] == (0.1, 0.1)
    assert found[f'{inside}.0.node.1.weight'] == (0.5, 0.1)
    assert found[f'{inside}.0.node.2.bias'] == (0.1, 0.1)
    assert found[f'{inside}.1.scale'] == (2.0, 0.0)
    assert found['conv2.weight'] == (1.0, 0.1)


def test_shared_decay_is_divided_by_the_factors():
    model = Net()
    mmexpand.expand_(model, ExpandConfig('cl', include='conv1'))
    found = options(model, by_layer(sgd(factor_decay='shared')))
    assert found['conv1.factors.0.weight'] == (1.0, pytest.approx(0.1 / 3))
    assert found['conv2.weight'] == (1.0, 0.1)


def twice(model, x):
    """A loss of a network whose last layer is called twice, as heads are on several levels."""
    inside = model.depthwise(model.norm(model.conv1(x)).relu())
    return model.conv2(inside).square().mean() + model.conv2(inside.sin()).square().mean()


@pytest.mark.parametrize('how', [dict(method='cl'), dict(method='rep')])
def test_product_decay_is_that_of_the_folded_kernel(how):
    torch.manual_seed(0)
    model = Net().double()
    mmexpand.expand_(model, ExpandConfig(include='conv2', **how))
    reference = copy.deepcopy(model)
    # Biases are not decayed: the decay of the kernel is the weight's.
    cfg = by_layer(sgd(factor_decay='product', bias_decay_mult=0.0))
    wrapper = build_optim_wrapper(model, cfg)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    # However often a layer is called, it is one kernel.
    twice(model, x).backward()
    wrapper.optimizer.step()
    loss = twice(reference, x) + 0.05 * reference.conv2.weight.square().sum()
    loss.backward()
    plain = copy.deepcopy(reference)
    plain.zero_grad()
    twice(plain, x).backward()
    for ours, theirs, without in zip(
        *(list(m.conv2.parameters()) for m in (model, reference, plain)), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
        if ours.dim() == 4:
            assert not torch.allclose(ours.grad, without.grad)


def test_what_cannot_be_is_refused():
    model = Net()
    mmexpand.expand_(model, ExpandConfig('repvgg', include='conv1'))
    with pytest.raises(ValueError, match='conv1'):
        build_optim_wrapper(model, by_layer(sgd(factor_decay='product')))
    with pytest.raises(ValueError, match="'shared'"):
        build_optim_wrapper(model, by_layer(sgd(factor_decay='none')))


def test_product_decay_knows_accumulation_and_unused_layers():
    torch.manual_seed(0)
    found = []
    for counts in (1, 2):
        model = Net().double()
        torch.manual_seed(1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        mmexpand.expand_(model, ExpandConfig('cl', include=['conv1', 'conv2'], init='preserve'))
        cfg = dict(by_layer(sgd(factor_decay='product')), accumulative_counts=counts)
        wrapper = build_optim_wrapper(model, cfg)
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        for _ in range(counts):
            wrapper.update_params(model(x).square().mean())
        found.append(model.conv2.weight)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    unused = model.conv1.weight.clone()
    model.zero_grad()
    model.conv2(torch.randn(2, 6, 8, 8, dtype=torch.float64)).mean().backward()
    for group in wrapper.optimizer.param_groups:
        group['momentum'] = 0
    wrapper.optimizer.step()
    assert torch.equal(model.conv1.weight, unused)


def test_product_decay_with_a_fused_optimizer_and_mixed_precision():
    """It divides by the scale of the loss itself."""
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = Net()
        mmexpand.expand_(model, ExpandConfig('cl', include='conv2', init='preserve'))
        cfg = by_layer(sgd(factor_decay='product'))
        cfg.update(optimizer=dict(cfg['optimizer'], fused=fused, lr=0.1))
        optimizer = build_optim_wrapper(model, cfg).optimizer
        scaler = torch.amp.GradScaler('cpu', init_scale=2.0**10, enabled=fused)
        before = model.conv2.weight.detach().clone()
        scaler.scale(0 * model(torch.randn(2, 3, 8, 8)).square().mean()).backward()
        scaler.step(optimizer)
        found.append((model.conv2.weight - before).detach())
        assert found[-1].abs().max() > 1e-3
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


def test_norms_in_branches_are_scales_whatever_their_class():
    model = Net()
    mmexpand.expand_(model, ExpandConfig('repvgg', include='conv1'))
    cfg = by_layer(sgd(scale_lr_mult=2.0))
    plain = options(model, cfg)
    synchronised = options(nn.SyncBatchNorm.convert_sync_batchnorm(model), cfg)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.conv1.modules())
    assert plain == synchronised
    assert plain['conv1.repvgg.0.norm.weight'] == (2.0, 0.0)


CLIPS = [None, dict(max_norm=0.05), dict(type='value', clip_value=0.002)]


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('clip', CLIPS, ids=str)
def test_null_with_outer_factors_frozen_the_kernel_follows_compact_sgd(clip, amp):
    """'preserve' makes the outer factors semi-orthogonal: then the inner one is the kernel."""
    torch.manual_seed(0)
    compact = Net().double()
    expanded = copy.deepcopy(compact)
    mmexpand.expand_(expanded, ExpandConfig('cl', 2, init='preserve', exclude='depthwise'))
    for unit in (expanded.conv1, expanded.conv2):
        unit.factors[0].requires_grad_(False)
        unit.factors[2].weight.requires_grad_(False)
        unit.factors[1].bias.requires_grad_(False)
    cfg = sgd()
    cfg['optimizer'].update(lr=0.05, weight_decay=0.0)
    if clip:
        cfg['clip_grad'] = clip
    start = compact.conv1.weight.clone()
    wrappers = [build_optim_wrapper(compact, cfg), build_optim_wrapper(expanded, by_layer(cfg))]
    scalers = [torch.amp.GradScaler('cpu', init_scale=2.0**10, enabled=amp) for _ in wrappers]
    for _ in range(30):
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        for model, wrapper, scaler in zip((compact, expanded), wrappers, scalers, strict=True):
            if amp:  # AmpOptimWrapper itself requires a GPU.
                wrapper.loss_scaler, wrapper._scale_update_param = scaler, None
                wrapper.__class__ = AmpOptimWrapper
                scaler.scale((model(x) - x.mean()).square().mean()).backward()
                wrapper.step()
                wrapper.zero_grad()
            else:
                wrapper.update_params((model(x) - x.mean()).square().mean())
    assert (compact.conv1.weight - start).abs().max() > 1e-3
    for name in ('conv1', 'conv2'):
        ours, theirs = getattr(expanded, name), getattr(compact, name)
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-10, atol=1e-10)


def test_clipping_of_blocks_with_norms_measures_their_parameters():
    model = Net()
    mmexpand.expand_(model, ExpandConfig('bn', include='conv2'))
    cfg = dict(by_layer(sgd()), clip_grad=dict(max_norm=1e-3))
    wrapper = build_optim_wrapper(model, cfg)
    (100 * model(torch.randn(2, 3, 8, 8)).square().mean()).backward()
    wrapper.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert nn.utils.get_total_norm(gradients).item() == pytest.approx(1e-3, rel=1e-3)


def test_clipping_may_measure_the_factors():
    torch.manual_seed(0)
    norms = []
    for paramwise in ({}, dict(clip_factors=True)):
        torch.manual_seed(0)
        model = Net().double()
        mmexpand.expand_(model, ExpandConfig('cl', include='conv2'))
        cfg = dict(by_layer(sgd(**paramwise)), clip_grad=dict(max_norm=1e-3))
        wrapper = build_optim_wrapper(model, cfg)
        model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).square().mean().backward()
        wrapper.step()
        norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)
    assert abs(norms[0] - norms[1]) > 1e-4, 'both measured the factors'


@pytest.mark.parametrize('clip', CLIPS[1:], ids=str)
def test_a_unit_that_ran_folded_and_layerwise_in_a_step_is_clipped_by_its_factors(clip):
    """The gradient of its kernel lacks that of the calls which ran layer by layer."""
    gradients = []
    for cfg in (sgd(), sgd(clip_factors=True)):
        torch.manual_seed(0)
        model = Net().double()
        mmexpand.expand_(model, ExpandConfig('cl', 8, include='conv2'))
        wrapper = build_optim_wrapper(model, dict(by_layer(cfg), clip_grad=clip))
        few, many = (torch.randn(1, 3, n, n, dtype=torch.float64) for n in (2, 40))
        sizes = [(1, 6, n, n) for n in (2, 40)]
        folds = [model.conv2.count_macs(s, True) <= model.conv2.count_macs(s, False) for s in sizes]
        assert folds == [False, True]
        (model(few).square().mean() + model(many).square().mean()).backward()
        wrapper.step()
        gradients.append([p.grad for p in model.conv2.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs)


class Read(Net):
    """Reads the weight of a layer that it calls, as mmseg's K-Net."""

    def forward(self, x):
        return super().forward(x) + self.conv2.weight.square().sum()


@pytest.mark.parametrize('clip', [*CLIPS[1:], dict(type='value', clip_value=1e9)], ids=str)
def test_a_unit_whose_weight_is_read_is_clipped_by_its_factors(clip):
    gradients = []
    for cfg in (sgd(), sgd(clip_factors=True)):
        torch.manual_seed(0)
        model = Read().double()
        mmexpand.expand_(model, ExpandConfig('cl', include='conv2', forward='folded'))
        wrapper = build_optim_wrapper(model, dict(by_layer(cfg), clip_grad=clip))
        model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).square().mean().backward()
        wrapper.step()
        gradients.append([p.grad for p in model.conv2.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs)


def test_clipping_measures_norms_of_which_one_call_was_empty():
    """An empty batch runs on the running statistics, whose kernel has a gradient of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).double()
    mmexpand.expand_(model, ExpandConfig('repvgg', forward='folded'))
    wrapper = build_optim_wrapper(model, dict(by_layer(sgd()), clip_grad=dict(max_norm=1e-3)))
    for images in (4, 0):
        model(torch.randn(images, 4, 8, 8, dtype=torch.float64)).square().sum().backward()
    wrapper.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert nn.utils.get_total_norm(gradients).item() == pytest.approx(1e-3, rel=1e-3)


def test_gradients_of_a_skipped_step_are_not_clipped_with_the_next():
    """As after a loss that is not a number."""
    steps = []
    for skipped in (False, True):
        torch.manual_seed(0)
        model = Net().double()
        mmexpand.expand_(model, ExpandConfig('cl', include='conv2'))
        cfg = dict(by_layer(sgd()), clip_grad=dict(max_norm=0.05))
        wrapper = build_optim_wrapper(model, cfg)
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        if skipped:
            (model(x).mean() * float('nan')).backward()
            wrapper.zero_grad()
        wrapper.update_params(model(x).square().mean())
        steps.append(model.conv2.weight.detach())
    assert steps[0].isfinite().all()
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize('kind', ['AdamW', 'Adam'])
def test_product_decay_requires_a_coupled_decay(kind):
    model = Net()
    mmexpand.expand_(model, ExpandConfig('cl', include='conv1'))
    cfg = sgd(factor_decay='product')
    cfg['optimizer'] = dict(type=kind, lr=0.01, weight_decay=0.1)
    if kind == 'Adam':
        build_optim_wrapper(model, by_layer(cfg))
        return
    with pytest.raises(ValueError, match=r"AdamW decays the weights themselves; use 'each'"):
        build_optim_wrapper(model, by_layer(cfg))
