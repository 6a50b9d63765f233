"""Every road by which weights reach a block with norms: the first step is the compact run's."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.runner import Runner
from mmseg.models.backbones import UNet
from mmseg.registry import MODELS
from torch import nn

import mmexpand
from mmexpand.mm import hooks as hooks_module
from mmexpand.mm.dry_run_training import dry_run_training
from mmexpand.mm.given import given_layers
from mmexpand.mm.models import build_compact_model
from mmexpand.mm.start import StartHook
from mmexpand.surgery import named_units
from tests.conftest import SEGMENTOR, small_config
from tests.runs import distances, train, words_of
from tests.test_mm.test_distill import HINT, make_teacher

UNITS = [f'backbone.encoder.{name}.conv' for name in ('0.0.convs.0', '1.1.convs.0', '1.1.convs.1')]
CONTRACT = dict(type='ContractHook')
ONE = {'train_cfg.max_iters': 1}


@MODELS.register_module(force=True)
class GivenUNet(UNet):
    """Loads weights in its constructor, and says as mmseg's TIMMBackbone that it is initialised."""

    built = 0

    def __init__(self, weights=None, without='', **kwargs):
        super().__init__(**kwargs)
        GivenUNet.built += 1
        if weights:
            given = torch.load(weights)['state_dict']
            given = {k.removeprefix('backbone.'): v for k, v in given.items()}
            self.load_state_dict(
                {k: v for k, v in given.items() if not without or without not in k}, strict=False
            )
        self._is_init = True


@pytest.fixture(scope='module')
def given(street, tmp_path_factory):
    """A checkpoint of the compact network, its norms' statistics those of images."""
    folder = tmp_path_factory.mktemp('given')
    cfg = small_config(street, folder)
    torch.manual_seed(3)
    model = build_compact_model(cfg)
    model.init_weights()
    model.decode_head.conv_seg.weight.data *= 50
    for _ in range(20):
        model(torch.randn(4, 3, 32, 48), mode='tensor')
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / 'given.pth')
    DefaultScope._instance_dict.clear()
    return str(folder / 'given.pth')


def hook(method='repvgg', include='backbone.encoder', **options):
    return dict(type='ExpandHook', method=method, include=include, **options)


def first_loss(runner) -> float:
    return runner.message_hub.get_scalar('train/loss').data[0][0]


def by_load_from(cfg, given):
    cfg.load_from = given


def by_pretrained(cfg, given):
    for part in ('backbone', 'decode_head'):
        init = dict(type='Pretrained', checkpoint=given, prefix=f'{part}.')
        cfg.model[part].init_cfg = init


def by_constructor(cfg, given):
    by_pretrained(cfg, given)
    del cfg.model.backbone['init_cfg']
    cfg.model.backbone.update(type='GivenUNet', weights=given)


ROADS = dict(load_from=by_load_from, pretrained=by_pretrained, constructor=by_constructor)


def expand_by(kind, cfg, **how):
    """Expand by the hook or a builder."""
    if kind == 'ExpandHook':
        cfg.custom_hooks.insert(0, hook(**how))
    elif kind == 'ExpandModel':
        cfg.model = dict(type=kind, model=cfg.model, include='backbone.encoder', **how)
    else:
        backbone = cfg.model.backbone
        cfg.model.backbone = dict(
            type=f'mmengine.{kind}', backbone=backbone, include='encoder', **how
        )


@pytest.mark.parametrize('road', ROADS)
@pytest.mark.parametrize(
    ('kind', 'method', 'forward'),
    [
        ('ExpandHook', 'bn', 'auto'),
        ('ExpandHook', 'repvgg', 'folded'),
        ('ExpandModel', 'repvgg', 'layerwise'),
        ('ExpandBackbone', 'bn', 'folded'),
    ],
)
def test_the_first_step_is_the_compact_networks(seg_cfg, given, road, kind, method, forward):
    compact = seg_cfg(custom_hooks=[], **ONE)
    cfg = seg_cfg(custom_hooks=[CONTRACT], work_dir=compact.work_dir + '2', **ONE)
    for each in (compact, cfg):
        ROADS[road](each, given)
    expand_by(kind, cfg, method=method, forward=forward)
    runner = train(cfg)
    assert list(named_units(runner.model)) == UNITS
    assert first_loss(runner) == pytest.approx(first_loss(train(compact)), rel=1e-4)
    words = words_of(runner)
    assert words.startswith('3 of 3 expanded layers start from given weights; on the first batch')
    assert len(distances(words)) == 2
    assert max(distances(words)) < 1e-4
    assert words in next(Path(cfg.work_dir).glob('*/*.log')).read_text()
    assert all(unit.given is None for unit in named_units(runner.model).values())


def test_default_discards_what_a_constructor_gave(seg_cfg, given):
    """And says so: the test above could fail."""
    losses = []
    for init in ('auto', 'default'):
        cfg = seg_cfg(custom_hooks=[hook(init=init)], **ONE)
        cfg.work_dir += init
        by_constructor(cfg, given)
        runner = train(cfg)
        losses.append(first_loss(runner))
    assert abs(losses[0] - losses[1]) > 0.01
    assert words_of(runner).startswith('0 of 3 expanded layers start from given weights, 3 from')


def test_random_layers_get_their_blocks_start(seg_cfg, given):
    """Some layers are given, one is not; and in a plain run none is."""
    cfg = seg_cfg(custom_hooks=[hook('bn'), CONTRACT], **ONE)
    by_constructor(cfg, given)
    cfg.model.backbone.without = 'encoder.1.1.convs.1.conv'
    cfg.train_cfg.max_iters = 1
    cfg.optim_wrapper.optimizer.lr = 0.0
    runner = train(cfg)
    words = words_of(runner)
    assert words.startswith(
        f'2 of 3 expanded layers start from given weights, 1 from their initialisation, {UNITS[2]} '
        'first; on the first batch'
    )
    assert max(distances(words)) < 1e-4
    gains = [unit._norms[0].norm.weight for unit in named_units(runner.model).values()]
    # The block's own, and of a calibrated norm the standard deviation.
    assert [bool((gain == 1).all()) for gain in gains] == [False, False, True]
    plain = train(seg_cfg(custom_hooks=[hook('bn')], work_dir=cfg.work_dir + '2', **ONE))
    assert words_of(plain) == (
        f'0 of 3 expanded layers start from given weights, 3 from their initialisation, {UNITS[0]} '
        'first'
    )
    assert distances(words_of(plain)) == []


def test_a_rate_that_cannot_hold_a_given_weight_is_refused(seg_cfg, given):
    cfg = seg_cfg(custom_hooks=[hook('cl', rate=0.5)], **ONE)
    train(cfg)  # Nothing is given.
    by_constructor(cfg, given)
    with pytest.raises(ValueError, match=r"init='auto' cannot preserve .*rate=0\.5.*'default'"):
        train(cfg)


def test_a_resumed_training_builds_and_says_nothing(seg_cfg, given):
    cfg = seg_cfg(custom_hooks=[hook()], **{'train_cfg.max_iters': 2})
    by_constructor(cfg, given)
    train(cfg)
    again = seg_cfg(custom_hooks=[hook()], resume=True, work_dir=cfg.work_dir)
    by_constructor(again, given)
    GivenUNet.built = 0
    runner = train(again)
    assert (runner.iter, GivenUNet.built, words_of(runner)) == (4, 1, None)


def test_an_expanded_checkpoint_starts_as_it_is(seg_cfg, given):
    first = train(seg_cfg(custom_hooks=[hook()], load_from=given))
    path = f'{first.work_dir}/iter_4.pth'
    work_dir = first.work_dir + '2'
    runner = train(seg_cfg(custom_hooks=[hook()], load_from=path, work_dir=work_dir, **ONE))
    assert words_of(runner).startswith('3 of 3 expanded layers start from given weights')
    found = distances(words_of(runner))
    # In training mode its norms normalise.
    assert found[0] < 1e-4 < found[1]


@pytest.mark.parametrize('method', ['bn', 'repvgg'])
def test_a_checkpoint_with_other_classes_and_channels(seg_cfg, given, method):
    """Layers of other shapes are skipped as mmengine skips them, the others preserved."""
    changes = {'model.decode_head.num_classes': 5, 'model.decode_head.channels': 6}
    include = ['backbone.encoder', 'decode_head.convs']
    cfg = seg_cfg(custom_hooks=[hook(method, include)], load_from=given, **changes, **ONE)
    cfg.optim_wrapper.optimizer.lr = 0.0
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        cfg.pop(key)
    cfg.model.decode_head.ignore_index = 13
    runner = train(cfg)
    words = words_of(runner)
    assert words.startswith(
        '3 of 4 expanded layers start from given weights, 1 from their initialisation, '
        'decode_head.convs.0.conv first'
    )
    assert max(distances(words)) < 1e-4
    expected = torch.load(given)['state_dict']
    for name in UNITS:
        norms = named_units(runner.model)[name]._norms
        assert any((norm.norm.weight != 1).any() for norm in norms)
        found = runner.model.get_submodule(name).weight
        # The first batch's statistics have moved it.
        assert (found - expected[f'{name}.weight']).norm() < 0.3 * found.norm()


@pytest.mark.parametrize('frozen', [False, True])
def test_norms_in_eval_mode_and_frozen_layers(seg_cfg, given, frozen):
    compact = seg_cfg(custom_hooks=[], load_from=given, **ONE)
    work_dir = compact.work_dir + '2'
    cfg = seg_cfg(custom_hooks=[hook()], load_from=given, work_dir=work_dir, **ONE)
    for each in (compact, cfg):
        each.model.type = 'NormEval'
        if frozen:
            each.model.backbone.type = 'GivenFrozen'
    runner = train(cfg)
    assert first_loss(runner) == pytest.approx(first_loss(train(compact)), rel=1e-4)
    assert max(distances(words_of(runner))) < 1e-4
    for unit in named_units(runner.model).values():
        assert any(p.requires_grad for p in unit.parameters()) != frozen
        assert all((norm.norm.running_mean == 0).all() for norm in unit._norms)


@MODELS.register_module(force=True)
class GivenFrozen(UNet):
    """Has a frozen stage, in eval mode."""

    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval().requires_grad_(False)
        return self


def test_distillation(seg_cfg, street, given, tmp_path):
    teacher = dict(make_teacher(street, tmp_path), losses=HINT)
    DefaultScope._instance_dict.clear()
    hint = dict(HINT['loss_hint'])
    teacher['losses'] = dict(loss_hint=hint)
    runner = train(seg_cfg(custom_hooks=[hook('bn'), teacher, CONTRACT], load_from=given))
    assert words_of(runner).startswith('3 of 3 expanded layers start from given weights; on')
    assert max(distances(words_of(runner))) < 1e-4
    assert runner.iter == 4


@pytest.mark.parametrize(('kind', 'method'), [('ExpandHook', 'bn'), ('ExpandModel', 'repvgg')])
def test_a_validation_before_training(seg_cfg, given, kind, method):
    """mmengine loads once, and initialises afterwards: the weights are loaded again."""
    losses = []
    for validates in (False, True):
        cfg = seg_cfg(custom_hooks=[CONTRACT], load_from=given, **ONE)
        expand_by(kind, cfg, method=method)
        cfg.work_dir += str(validates)
        runner = Runner.from_cfg(cfg)
        if validates:
            runner.val()
        runner.train()
        losses.append(first_loss(runner))
        assert max(distances(words_of(runner))) < 1e-4
    assert losses[0] == losses[1]


def test_a_runner_that_was_given_a_model(seg_cfg, given):
    """Nothing can build it again: what its own initialisation leaves is preserved."""
    cfg = seg_cfg()
    init_default_scope('mmseg')
    by_pretrained(cfg, given)
    runner = Runner(
        model=build_compact_model(cfg),
        work_dir=cfg.work_dir,
        train_dataloader=cfg.train_dataloader,
        train_cfg=dict(by_epoch=False, max_iters=1),
        optim_wrapper=cfg.optim_wrapper,
        custom_hooks=[hook('bn')],
        default_scope='mmseg',
        experiment_name=cfg.experiment_name,
    )
    runner.train()
    assert words_of(runner).startswith('3 of 3 expanded layers start from given weights; on')
    assert max(distances(words_of(runner))) < 1e-4


class Keep(Hook):
    """Keeps the random states behind each iteration."""

    priority = 'LOWEST'

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, *_, **__):
        states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
        self.seen.append([np.asarray(state).tolist() for state in states[:2]] + [states[2]])


def test_looking_at_the_start_leaves_the_training_alone(seg_cfg, given, monkeypatch):
    runs = []
    for looks in (True, False):
        cfg = seg_cfg(custom_hooks=[hook(), dict(type='EMAHook')], load_from=given)
        cfg.work_dir += str(looks)
        cfg.train_dataloader.sampler.shuffle = True
        cfg.model.decode_head.dropout_ratio = 0.5
        cfg.train_dataloader.dataset.pipeline.insert(2, dict(type='RandomFlip', prob=0.5))
        if not looks:
            monkeypatch.setattr(StartHook, 'before_train_iter', lambda *_, **__: None)
        runner = Runner.from_cfg(cfg)
        keep = Keep()
        runner.register_hook(keep)
        runner.train()
        runs.append((keep.seen, runner.model.state_dict()))
    (seen, weights), (expected_seen, expected) = runs
    assert seen == expected_seen
    assert list(weights) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def test_a_dry_run_tells_the_distance(seg_cfg, given):
    cfg = seg_cfg(custom_hooks=[hook()], load_from=given)
    words = dry_run_training(cfg).start
    assert words.startswith('3 of 3 expanded layers start from given weights; on the first batch')
    assert max(distances(words)) < 1e-4


class Parts(nn.Module):
    """A given, a random, a constant and a lazy layer."""

    def __init__(self):
        super().__init__()
        self.given, self.random, self.zero = (nn.Conv2d(3, 4, 3) for _ in range(3))
        self.lazy = nn.LazyConv2d(4, 3)
        self.same = self.given
        values = torch.arange(108.0) / 108
        self.given.load_state_dict(dict(weight=values.view(4, 3, 3, 3), bias=torch.zeros(4)))
        nn.init.zeros_(self.zero.weight)
        np.random.rand()
        random.random()


def test_weights_that_a_constructor_gives(monkeypatch):
    torch.manual_seed(0)
    built = Parts()
    # As the first build would be repeated by a constructor that nobody reseeds.
    torch.manual_seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert given_layers(built, Parts) == {'given', 'same', 'zero'}
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(states[0], after[0])
    assert states[1:] == after[1:]
    assert given_layers(built, lambda: nn.ModuleDict(dict(random=nn.Conv2d(3, 4, 3)))) == {
        'given',
        'same',
        'zero',
    }
    said = []
    monkeypatch.setattr('mmexpand.mm.given.log', lambda line, level: said.append(line))
    assert given_layers(built, lambda: 1 / 0) is None
    assert 'takes all weights as given' in said[0]
    assert 'division by zero' in said[0]


def test_a_model_that_cannot_be_built_again_is_initialised_and_preserved(monkeypatch):
    monkeypatch.setattr('mmexpand.mm.given.log', lambda *_: None)
    init_default_scope('mmseg')
    unet = MODELS.build(SEGMENTOR['backbone'])
    cfg = mmexpand.ExpandConfig('bn', include='encoder')
    plan = hooks_module.expand_built(unet, cfg, lambda: 1 / 0)
    assert {layer.init for layer in plan} == {'preserve'}
    assert unet.is_init


def test_a_zero_kernel_stays_zero():
    """It is equal in two builds, and every block can preserve it."""
    for method in ('cl', 'bn', 'repvgg'):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
        nn.init.zeros_(net[0].weight)
        mmexpand.expand_(net, method=method)
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(net.eval()(x), net[0].bias.view(1, 4, 1, 1).expand(2, 4, 8, 8))
        y = net.train()(x)
        assert y.isfinite().all()
        y.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize('name', ['test_resnet'])
def test_timm_loads_once_more_from_its_cache(name, tmp_path, seg_cfg):
    """``pretrained=True``, its weights from a file in the place of the network's."""
    timm = pytest.importorskip('timm')
    torch.manual_seed(5)
    torch.save(timm.create_model(name).state_dict(), tmp_path / 'timm.pth')
    cfg = dict(
        type='TIMMBackbone',
        model_name=name,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'timm.pth')),
        _scope_='mmseg',
    )
    init_default_scope('mmseg')
    parent = dict(seg_cfg().model, backbone=cfg)
    parent['decode_head'] = dict(parent['decode_head'], in_channels=32, in_index=-1)
    compact = MODELS.build(cfg)
    how = dict(include='backbone', method='repvgg')
    model = MODELS.build(dict(type='mmengine.ExpandModel', model=parent, **how))
    model.init_weights()
    found = mmexpand.contract(model.backbone).state_dict()
    assert len(named_units(model)) > 3
    for key, value in compact.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
