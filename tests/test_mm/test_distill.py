"""A teacher's losses in real, short Runners: in the step they train, and nowhere else."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import (
    HOOKS,
    MODELS,
    OPTIM_WRAPPERS,
    DefaultScope,
    init_default_scope,
)
from mmengine.runner import Runner
from mmpretrain.models import ClsDataPreprocessor
from mmseg.apis import init_model
from torch import nn

import mmexpand
from mmexpand.mm import distill
from mmexpand.mm.checkpoints import DISTILL_LOSSES
from mmexpand.mm.distill import DistillHook
from mmexpand.surgery import named_units
from mmexpand.surgery.checkpoint import META_KEY, CheckpointError, load_checkpoint
from tests.conftest import SEGMENTOR, small_config
from tests.processes import run_workers
from tests.runs import train
from tests.tools_in_process import run

EXPAND = dict(type='ExpandHook', method='cl', include='backbone.encoder', rate=2)
CONTRACT = dict(type='ContractHook')
EMA = dict(type='EMAHook', momentum=0.1)
ENCODER = 'backbone.encoder.1.1'
LOSSES = dict(
    loss_kd=dict(
        type='KDLoss', tau=2.0, student='decode_head.conv_seg', teacher='decode_head.conv_seg'
    ),
    loss_hint=dict(
        type='HintLoss', in_channels=8, out_channels=12, student=ENCODER, teacher=ENCODER
    ),
    loss_pkt=dict(type='PKTLoss', student=ENCODER, teacher=ENCODER),
)
WORKER = Path(__file__).with_name('distill_worker.py')
KD, HINT = ({name: LOSSES[name]} for name in ('loss_kd', 'loss_hint'))


@pytest.fixture(scope='session')
def teacher(street, tmp_path_factory):
    """Config and checkpoint of a wider U-Net, its norms' statistics not the initial ones."""
    folder = tmp_path_factory.mktemp('teacher')
    return make_teacher(street, folder)


def make_teacher(street, folder, **changes):
    cfg = small_config(street, folder)
    cfg.merge_from_dict(
        {
            'model.backbone.base_channels': 6,
            'model.decode_head.in_channels': 6,
            'model.decode_head.channels': 6,
            **changes,
        }
    )
    init_default_scope('mmseg')
    torch.manual_seed(7)
    model = MODELS.build(cfg.model)
    model.init_weights()
    # Not as near to indifference between classes as it starts.
    model.decode_head.conv_seg.weight.data *= 50
    model(torch.randn(4, 3, 32, 48), mode='tensor')
    cfg.custom_hooks = []
    cfg.dump(folder / 'teacher.py')
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / 'teacher.pth')
    return dict(
        type='DistillHook',
        teacher_config=str(folder / 'teacher.py'),
        teacher_ckpt=str(folder / 'teacher.pth'),
    )


def distiller(runner) -> DistillHook:
    return next(hook for hook in runner.hooks if isinstance(hook, DistillHook))


def logged(work_dir) -> list[dict]:
    path = next(Path(work_dir).glob('*/vis_data/scalars.json'))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if 'loss' in line]


def weights(path) -> dict:
    return load_checkpoint(path)['state_dict']


@HOOKS.register_module(force=True)
class KeepStart(Hook):
    """Keeps what the first iteration starts from."""

    priority = 'LOWEST'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 0:
            self.student, self.batch = copy.deepcopy(runner.model), copy.deepcopy(data_batch)


def test_losses_are_those_of_the_batch_that_the_student_sees(seg_cfg, teacher):
    hooks = [EXPAND, dict(teacher, losses=LOSSES), dict(type='KeepStart'), CONTRACT]
    cfg = seg_cfg(custom_hooks=hooks)
    runner = train(cfg)
    first = logged(cfg.work_dir)[0]
    parts = [first[key] for key in ('decode.loss_ce', *LOSSES)]
    assert all(part > 0 for part in parts)
    assert first['loss'] == pytest.approx(sum(parts), rel=1e-6)
    start = next(hook for hook in runner.hooks if isinstance(hook, KeepStart))
    # Each with its own forward pass, the student in training mode.
    student = start.student.train()
    data = student.data_preprocessor(start.batch, True)
    frozen = MODELS.build(Config.fromfile(teacher['teacher_config']).model).eval()
    frozen.load_state_dict(weights(teacher['teacher_ckpt']))
    ours, theirs = (features(model, data) for model in (student, frozen))
    hint = student.distill_losses.loss_hint.regressor
    seen = np.einsum('oc,nchw->nohw', double(hint.weight), ours[0])
    expected = dict(
        loss_kd=divergence(theirs[1] / 2, ours[1] / 2) * 4,
        loss_hint=0.5 * ((seen - theirs[0]) ** 2).mean(),
        loss_pkt=divergence(*(np.log(neighbours(x[0])) for x in (theirs, ours))),
    )
    assert expected['loss_kd'] > 0.01
    assert not hint.bias.any()
    for name, value in expected.items():
        assert first[name] == pytest.approx(value, rel=1e-4), name


def features(model, data):
    """The encoder's map and the class scores, in float64."""
    with torch.no_grad():
        found = []
        module = model.get_submodule(ENCODER)
        handle = module.register_forward_hook(lambda _, __, output: found.append(double(output)))
        found.append(double(model(**data, mode='tensor')))
        handle.remove()
    return found


def double(tensor):
    return tensor.detach().double().numpy().copy()


def divergence(p, q):
    """The mean Kullback-Leibler divergence of two softmaxes over the second dimension."""
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (p, q))
    return (p * np.log(p / q)).sum(1).mean()


def neighbours(features):
    """By image, how near the others are: cosines, from 0 to 1."""
    flat = features.reshape(len(features), -1)
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    return (flat @ flat.T + 1) / 2


def test_the_teacher_is_nowhere_but_in_the_hook(seg_cfg, teacher):
    cfg = seg_cfg(custom_hooks=[EXPAND, EMA, dict(teacher, losses=KD), CONTRACT])
    runner = train(cfg)
    frozen = distiller(runner).teacher
    before = weights(teacher['teacher_ckpt'])
    assert list(before) == list(frozen.state_dict())
    assert all(torch.equal(before[key], value) for key, value in frozen.state_dict().items())
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    theirs = set(frozen.modules()) | set(frozen.parameters())
    ema = next(hook for hook in runner.hooks if isinstance(hook, EMAHook))
    # Also of what else a copy would hold: a teacher that was copied is no longer the same object.
    for model in (runner.model, ema.ema_model):
        assert not theirs & (set(model.modules()) | set(model.parameters()))
        assert not any(module._forward_hooks for module in model.modules())
    plain = MODELS.build(SEGMENTOR)
    compact = weights(Path(cfg.work_dir) / 'compact_last.pth')
    assert list(compact) == list(plain.state_dict())
    assert not any(DISTILL_LOSSES in key for key in weights(f'{cfg.work_dir}/iter_4.pth'))
    held = {p for group in runner.optim_wrapper.param_groups for p in group['params']}
    assert held == set(runner.model.parameters())


def test_a_regressor_trains_and_is_not_deployed(seg_cfg, teacher):
    hooks = [dict(type='KeepStart'), EXPAND, EMA, dict(teacher, losses=LOSSES), CONTRACT]
    cfg = seg_cfg(**{'custom_hooks': hooks, 'default_hooks.checkpoint.save_best': 'mIoU'})
    runner = train(cfg)
    start = next(hook for hook in runner.hooks if isinstance(hook, KeepStart)).student
    key = f'{DISTILL_LOSSES}.loss_hint.regressor.weight'
    trained = runner.model.state_dict()[key]
    assert not torch.equal(trained, start.state_dict()[key])
    # EMAHook saves the averaged weights in front, and these as its own.
    assert torch.equal(
        load_checkpoint(f'{cfg.work_dir}/iter_4.pth')['ema_state_dict'][f'module.{key}'], trained
    )
    held = {p for group in runner.optim_wrapper.param_groups for p in group['params']}
    assert runner.model.get_parameter(key) in held
    expected = mmexpand.contract(runner.model).state_dict()
    for name in ('last', 'best', 'ema'):
        path = f'{cfg.work_dir}/compact_{name}.pth'
        assert not any(DISTILL_LOSSES in key for key in weights(path))
        assert load_checkpoint(path)['meta'][META_KEY]['max_error'] < 1e-5
    assert all(
        torch.equal(value, expected[name])
        for name, value in weights(f'{cfg.work_dir}/compact_last.pth').items()
    )
    compact = Config.fromfile(f'{cfg.work_dir}/compact_config.py')
    assert [hook['type'] for hook in compact.custom_hooks] == ['KeepStart', 'EMAHook']
    assert 'teacher' not in compact.pretty_text
    model = init_model(compact, None, device='cpu')
    model.load_state_dict(weights(f'{cfg.work_dir}/compact_last.pth'), strict=True)


@MODELS.register_module(force=True)
class OwnLoss(nn.Module):
    """A user's loss with a convolution."""

    def __init__(self):
        super().__init__()
        self.adapt = nn.Conv2d(8, 8, 1)

    def forward(self, student, teacher):
        return self.adapt(student).square().mean() + teacher.mean()


def test_layers_of_a_users_loss_are_not_expanded(seg_cfg, teacher):
    losses = dict(loss_own=dict(type='OwnLoss', student=ENCODER, teacher=ENCODER))
    hooks = [dict(type='ExpandHook', method='cl', rate=2), dict(teacher, losses=losses), CONTRACT]
    runner = train(seg_cfg(custom_hooks=hooks))
    units = named_units(runner.model)
    assert units and not any('distill_losses' in name for name in units)


@pytest.mark.parametrize('custom_hooks', [[EXPAND, CONTRACT], []], ids=['expanded', 'compact'])
def test_resume_gives_the_same_as_not_stopping(seg_cfg, teacher, custom_hooks):
    hooks = [*custom_hooks, dict(teacher, losses=LOSSES)]
    cfg = seg_cfg(custom_hooks=hooks)
    whole = train(cfg)
    resumed_cfg = seg_cfg(
        custom_hooks=hooks,
        resume=True,
        load_from=f'{cfg.work_dir}/iter_2.pth',
        work_dir=cfg.work_dir + '2',
    )
    resumed = train(resumed_cfg)
    assert resumed.iter == 4
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=1e-7)
    key = f'{DISTILL_LOSSES}.loss_hint.regressor.weight'
    before = weights(f'{cfg.work_dir}/iter_2.pth')[key]
    assert not torch.equal(before, whole.model.state_dict()[key])


def test_without_the_hook_such_a_checkpoint_starts_but_is_not_resumed(seg_cfg, teacher):
    cfg = seg_cfg(custom_hooks=[EXPAND, dict(teacher, losses=HINT)])
    train(cfg)
    path = f'{cfg.work_dir}/iter_4.pth'
    started = train(seg_cfg(**{'load_from': path, 'train_cfg.max_iters': 0}))
    own = weights(path)
    assert all(torch.equal(own[key], value) for key, value in started.model.state_dict().items())
    with pytest.raises(CheckpointError, match='resume with the DistillHook'):
        train(seg_cfg(load_from=path, resume=True))
    # Tested with its own config, it needs no teacher.
    cfg.custom_hooks[1].teacher_ckpt = 'gone.pth'
    cfg.load_from = path
    assert Runner.from_cfg(cfg).test()['mIoU'] > 0


@pytest.mark.parametrize('arguments', [[], ['--shape', 32, 48]], ids=['data', 'shape'])
def test_the_tool_contracts_such_a_checkpoint(seg_cfg, teacher, tmp_path, arguments):
    cfg = seg_cfg(
        **{'custom_hooks': [EXPAND, dict(teacher, losses=HINT)], 'train_cfg.max_iters': 2}
    )
    train(cfg)
    cfg.dump(tmp_path / 'student.py')
    DefaultScope._instance_dict.clear()
    paths = tmp_path / 'student.py', f'{cfg.work_dir}/iter_2.pth'
    assert run('contract.py', *paths, '--work-dir', tmp_path, *arguments) == (0, '')
    compact = weights(tmp_path / 'compact_iter_2.pth')
    assert list(compact) == list(MODELS.build(SEGMENTOR).state_dict())


@pytest.mark.parametrize('by', ['hook', 'builder'])
def test_the_expanded_student_with_its_optimizers_options(seg_cfg, teacher, by):
    """The regressor beside a builder too, with options of its own, under a schedule."""
    cfg = seg_cfg(custom_hooks=[EXPAND, dict(teacher, losses=HINT), CONTRACT])
    if by == 'builder':
        del cfg.custom_hooks[0]
        expand = {key: value for key, value in EXPAND.items() if key != 'type'}
        cfg.model = dict(type='ExpandModel', model=cfg.model, **expand)
    cfg.optim_wrapper.paramwise_cfg = dict(custom_keys={DISTILL_LOSSES: dict(lr_mult=5.0)})
    runner = train(cfg)
    rates = {
        name: group['lr']
        for group in runner.optim_wrapper.param_groups
        for name, parameter in runner.model.named_parameters()
        if any(parameter is held for held in group['params'])
    }
    assert set(rates) == {name for name, _ in runner.model.named_parameters()}
    base = rates['decode_head.conv_seg.weight']
    assert 0 < base < 0.01, 'the schedule does not reach the optimizer'
    assert rates[f'{DISTILL_LOSSES}.loss_hint.regressor.weight'] == pytest.approx(5 * base)
    assert (Path(cfg.work_dir) / 'compact_last.pth').exists()


def test_the_rest_of_the_training_is_left_alone(seg_cfg, teacher):
    """A loss of weight 0 leaves the model where it would be without."""
    without = train(seg_cfg(custom_hooks=[EXPAND]))
    nothing = {name: dict(loss, loss_weight=0.0) for name, loss in LOSSES.items()}
    beside = train(seg_cfg(custom_hooks=[EXPAND, dict(teacher, losses=nothing)]))
    for name, value in without.model.state_dict().items():
        torch.testing.assert_close(beside.model.state_dict()[name], value, rtol=0, atol=1e-7)


@OPTIM_WRAPPERS.register_module(force=True)
class Bfloat16(OptimWrapper):
    """Scales losses as AmpOptimWrapper does on a GPU."""

    def optim_context(self, model):
        return torch.autocast('cpu', torch.bfloat16)


def test_mixed_precision(seg_cfg, teacher):
    hooks = [EXPAND, dict(teacher, losses=LOSSES), CONTRACT]
    full, mixed = seg_cfg(custom_hooks=hooks), seg_cfg(custom_hooks=hooks)
    mixed.optim_wrapper.type = 'Bfloat16'
    mixed.work_dir += '_mixed'
    train(full)
    train(mixed)
    first, second = (logged(cfg.work_dir)[0] for cfg in (full, mixed))
    for name in LOSSES:
        assert first[name] != second[name]
        assert first[name] == pytest.approx(second[name], rel=0.05), name


NEAR = 'decode_head.conv_segg'


@pytest.mark.parametrize(
    ('losses', 'message'),
    [
        (dict(kd=KD['loss_kd']), "'kd' would not be minimised.*call it 'loss_kd'"),
        (dict(loss_kd=dict(type='KDLoss')), r"losses\['loss_kd'\] lacks student, teacher"),
        (
            dict(loss_kd=dict(KD['loss_kd'], student=NEAR)),
            'loss_kd: student=.*is not a module of the model; near matches: decode_head.conv_seg',
        ),
        (
            dict(loss_kd=dict(KD['loss_kd'], teacher=NEAR)),
            'loss_kd: teacher=.*is not a module of the model; near matches: decode_head.conv_seg',
        ),
        (
            dict(loss_hint=dict(type='HintLoss', student=ENCODER, teacher=ENCODER)),
            f'loss_hint cannot compare {ENCODER} of the student.*in_channels=8, out_channels=12',
        ),
        (
            dict(loss_pkt=dict(type='PKTLoss', student='backbone', teacher='backbone')),
            'a module returns a list, not a tensor; name a module inside',
        ),
        (
            dict(loss_pkt=dict(type='PKTLoss', student=f'{ENCODER}.convs.0.bn', teacher=ENCODER)),
            'changes the output of a compared module in place',
        ),
        ({'decode.loss_ce': KD['loss_kd']}, "already has a loss 'decode.loss_ce'; choose"),
        (
            dict(loss_kd=dict(KD['loss_kd'], teacher='decode_head.loss_decode')),
            'called 1 and 0 times; name modules that are called equally',
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_iteration(seg_cfg, teacher, losses, message):
    cfg = seg_cfg(custom_hooks=[EXPAND, dict(teacher, losses=losses)])
    with pytest.raises(ValueError, match=message):
        train(cfg)
    assert not logged_anything(cfg)


def logged_anything(cfg) -> bool:
    return any(path.read_text() for path in Path(cfg.work_dir).glob('*/vis_data/scalars.json'))


def test_a_teacher_that_does_not_fit_is_refused(seg_cfg, teacher, street, tmp_path):
    hook = dict(teacher, losses=KD)
    with pytest.raises(CheckpointError, match=r'gone\.pth: no such checkpoint'):
        train(seg_cfg(custom_hooks=[dict(hook, teacher_ckpt='gone.pth')]))
    with pytest.raises(ValueError, match=r'gone\.py: no such config file'):
        train(seg_cfg(custom_hooks=[dict(hook, teacher_config='gone.py')]))
    with pytest.raises(CheckpointError, match='of another network'):
        other = tmp_path / 'other.pth'
        torch.save(dict(state_dict=dict(weight=torch.zeros(1))), other)
        train(seg_cfg(custom_hooks=[dict(hook, teacher_ckpt=str(other))]))
    classes = make_teacher(street, tmp_path, **{'model.decode_head.num_classes': 5})
    with pytest.raises(ValueError, match='student gives 19 scores and the teacher 5; use a'):
        train(seg_cfg(custom_hooks=[dict(classes, losses=KD)]))
    images = make_teacher(street, tmp_path, **{'model.data_preprocessor.std': [1.0] * 3})
    with pytest.raises(ValueError, match=r"teacher's data_preprocessor has std=\[1.0, 1.0, 1.0\]"):
        train(seg_cfg(custom_hooks=[dict(images, losses=KD)]))


def test_mmpretrains_channel_order():
    def model(to_rgb):
        module = nn.Module()
        module.data_preprocessor = ClsDataPreprocessor([1, 2, 3], [1, 1, 1], to_rgb=to_rgb)
        return module

    distill._check_same_images(model(True), model(True))
    with pytest.raises(ValueError, match='has channel_conversion=False, the student'):
        distill._check_same_images(model(True), model(False))


def test_a_student_that_cannot_learn_it_is_refused(seg_cfg, teacher):
    cfg = seg_cfg(custom_hooks=[dict(teacher, losses=HINT), dict(type='FreezeBackbone')])
    with pytest.raises(ValueError, match="the student's output has no gradient"):
        train(cfg)


@HOOKS.register_module(force=True)
class FreezeBackbone(Hook):
    def before_train(self, runner):
        runner.model.backbone.requires_grad_(False)


def test_an_optimizer_that_is_built_already_is_refused(seg_cfg, teacher):
    cfg = seg_cfg(custom_hooks=[dict(teacher, losses=HINT)])
    runner = Runner.from_cfg(cfg)
    runner.optim_wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
    runner.cfg.optim_wrapper = None
    with pytest.raises(
        RuntimeError, match=r'the parameters of loss_hint.*give the Runner its config'
    ):
        runner.train()


def test_compilation_is_refused(seg_cfg, teacher):
    with pytest.raises(ValueError, match='does not support compile'):
        train(seg_cfg(custom_hooks=[dict(teacher, losses=KD)], compile=True))


def test_two_teachers(seg_cfg, teacher):
    hints = [{f'loss_hint{i}': HINT['loss_hint']} for i in (1, 2)]
    cfg = seg_cfg(
        custom_hooks=[EXPAND, *(dict(teacher, losses=losses) for losses in hints), CONTRACT]
    )
    model = train(cfg).model
    assert list(model.distill_losses) == ['loss_hint1', 'loss_hint2']
    assert {'loss_hint1', 'loss_hint2'} <= set(logged(cfg.work_dir)[0])


def test_an_expanded_checkpoint_teaches_as_its_compact_network(seg_cfg, teacher, street, tmp_path):
    cfg = small_config(street, tmp_path / 'wide')
    cfg.merge_from_dict(
        {key: 6 for key in ('model.backbone.base_channels', 'model.decode_head.in_channels')}
    )
    cfg.train_cfg.max_iters = 2
    wide = train(cfg)
    cfg.dump(tmp_path / 'wide.py')
    hook = dict(
        type='DistillHook',
        teacher_config=str(tmp_path / 'wide.py'),
        teacher_ckpt=f'{cfg.work_dir}/iter_2.pth',
        losses=KD,
    )
    frozen = distiller(train(seg_cfg(custom_hooks=[hook]))).teacher
    expected = mmexpand.contract(wide.model).state_dict()
    assert list(expected) == list(frozen.state_dict())
    for name, value in frozen.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def distributed_config(street, directory, teacher, batch_size) -> Config:
    """Without statistics of a batch, which every process would have of its own."""
    losses = {name: LOSSES[name] for name in ('loss_kd', 'loss_hint')}
    hooks = [EXPAND, dict(teacher, losses=losses), CONTRACT]
    cfg = small_config(street, directory, custom_hooks=hooks)
    for part in (cfg.model.backbone, cfg.model.decode_head):
        part.norm_cfg = dict(type='GN', num_groups=1)
    cfg.train_dataloader.batch_size = batch_size
    return cfg


def test_two_processes_train_as_one(street, teacher, tmp_path):
    run_workers(WORKER, street, tmp_path, json.dumps(teacher), timeout=900)
    ranks = [torch.load(tmp_path / f'rank_{rank}.pth') for rank in (0, 1)]
    alone = train(distributed_config(street, tmp_path / 'alone', teacher, batch_size=4)).model
    expected = alone.state_dict()
    assert f'{DISTILL_LOSSES}.loss_hint.regressor.weight' in expected
    for name, value in expected.items():
        assert torch.equal(ranks[0]['weights'][name], ranks[1]['weights'][name]), name
        torch.testing.assert_close(ranks[0]['weights'][name], value, rtol=1e-4, atol=1e-6)
    # The compact network's gradients and the regressor's: no teacher's, no factors'.
    compact = mmexpand.contract(alone)
    assert ranks[0]['reduced'] == sum(p.numel() for p in compact.parameters())
    assert 'distill' not in ''.join(weights(tmp_path / 'work_dir' / 'compact_last.pth'))
