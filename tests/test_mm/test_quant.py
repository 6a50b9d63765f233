"""Quantisation-aware training: what is trained, what is written, and what is deployed."""

from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

pytest.importorskip('onnxruntime')
from mmexpand.deploy import Int8, export_onnx, load_compact_model, onnxruntime_run, trained_ranges
from mmexpand.mm.checkpoints import unwrap
from mmexpand.mm.quant import QuantHook
from mmexpand.surgery import named_units
from mmexpand.surgery.checkpoint import load_checkpoint
from tests.runs import log_of
from tests.tools_in_process import run

# Of values as in training, and of different brightness, for raw outputs that differ much.
IMAGES = [
    torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(i)) * 0.5 * (i + 1) - 1
    for i in range(3)
]
EXPAND = dict(type='ExpandHook', include='backbone.encoder', method='repvgg', init='preserve')
QUANT = dict(type='QuantHook', start=0.25, freeze=0.75)
WATCH = dict(type='Watch', priority='ABOVE_NORMAL')  # in front of QuantHook


@HOOKS.register_module(force=True)
class Watch(Hook):
    """Keeps what the network computes, and in which mode its norms are, after every iteration."""

    def __init__(self):
        self.outputs, self.training, self.ranges = [], [], []

    @torch.no_grad()
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        model = unwrap(runner.model)
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self.training.append({norm.training for norm in norms})
        (hook,) = (hook for hook in runner.hooks if isinstance(hook, QuantHook))
        self.ranges.append(hook.meta())

    @torch.no_grad()
    def after_train(self, runner):
        model = unwrap(runner.model)
        self.output = model.eval()(IMAGES[0], mode='tensor')
        self.state = {k: v.clone() for k, v in model.state_dict().items()}


def train(cfg, **kwargs):
    runner = Runner.from_cfg(cfg)
    runner.train(**kwargs)
    (watch,) = (hook for hook in runner.hooks if isinstance(hook, Watch))
    return runner, watch


def exported(cfg, checkpoint, path, **options):
    """Return the outputs of an int8 file with the trained ranges in ONNX Runtime."""
    model = load_compact_model(cfg, checkpoint)
    int8 = Int8(IMAGES, **{**trained_ranges(checkpoint), **options})
    report = export_onnx(model, IMAGES[0], path, raw=True, int8=int8)
    return report, torch.from_numpy(onnxruntime_run(path)(IMAGES[0].numpy())[0]), model


def check_same(found, expected, ranges):
    """Ties may be rounded the other way: by one step of the last layer, in few places."""
    low, high = ranges['decode_head.conv_seg']['output']
    steps = (found - expected).abs() * 255 / (high - low)
    assert steps.max() < 1.01
    assert (steps > 0.01).double().mean() < 0.002


@pytest.mark.parametrize('expanded', [True, False])
def test_the_int8_file_computes_what_was_trained(seg_cfg, tmp_path, expanded):
    more = [EXPAND, dict(type='ContractHook')] if expanded else []
    # Larger than mmseg's, for outputs that depend on the image after a few iterations.
    init = dict(type='Normal', std=0.5, override=dict(name='conv_seg'))
    changes = {'train_cfg.max_iters': 8, 'model.decode_head.init_cfg': init}
    cfg = seg_cfg(custom_hooks=[QUANT, WATCH, *more], **changes)
    runner, watch = train(cfg)
    name = 'compact_last.pth' if expanded else 'iter_8.pth'
    checkpoint = Path(cfg.work_dir) / name
    content = torch.load(checkpoint, weights_only=True) if expanded else load_checkpoint(checkpoint)
    given = content['meta']['mmexpand_int8']
    assert given['target'] == 'x86'
    assert len(given['ranges']) == 8
    stock = load_compact_model(cfg, checkpoint)
    assert content['state_dict'].keys() == stock.state_dict().keys()
    report, found, model = exported(cfg, checkpoint, tmp_path / 'int8.onnx')
    assert report.int8.kept == ()
    check_same(found, watch.output, given['ranges'])
    float_output = model(IMAGES[0], mode='tensor')
    assert (float_output - watch.output).abs().max() > 0.01 * float_output.abs().max()
    # The Runner is left with the float network.
    torch.testing.assert_close(
        unwrap(runner.model).eval()(IMAGES[0], mode='tensor'), float_output, rtol=1e-3, atol=1e-4
    )
    # Norms are trained for 2 iterations and one that observes; then they are frozen, in spite of
    # validations every two iterations. So are the ranges, later.
    assert watch.training[:2] == [{True}] * 2
    assert watch.training[3:] == [{False}] * 5
    assert watch.ranges[:2] == [{}] * 2
    assert watch.ranges[3] != watch.ranges[5]
    assert watch.ranges[6] == watch.ranges[7]


def test_weights_learn_from_the_rounding(seg_cfg):
    states = []
    for start in (0, 1):
        cfg = seg_cfg(custom_hooks=[dict(QUANT, start=start, freeze=1), WATCH])
        states.append(train(cfg)[1].state)
    name = 'backbone.encoder.0.0.convs.0.conv.weight'
    assert not torch.equal(states[0][name], states[1][name])


def test_a_resumed_run_goes_on_from_its_ranges(seg_cfg):
    hooks = [dict(QUANT, start=0, freeze=0.5), WATCH, EXPAND, dict(type='ContractHook')]
    cfg = seg_cfg(custom_hooks=hooks, **{'train_cfg.max_iters': 6})
    train(cfg)
    saved = trained_ranges(f'{cfg.work_dir}/iter_4.pth')
    cfg.resume, cfg.load_from = True, f'{cfg.work_dir}/iter_4.pth'
    assert train(cfg)[1].ranges[-1]['mmexpand_int8'] == saved
    ends = [load_checkpoint(f'{cfg.work_dir}/iter_{i}.pth')['state_dict'] for i in (4, 6)]
    statistics = [key for key in ends[0] if 'running' in key]
    assert statistics and all(torch.equal(ends[0][key], ends[1][key]) for key in statistics)


def test_a_start_that_is_not_reached_is_warned_of(seg_cfg):
    cfg = seg_cfg(custom_hooks=[dict(QUANT, start=1, freeze=1), WATCH])
    train(cfg)
    assert 'QuantHook has not started: start=1 of 4 iterations was not reached' in log_of(cfg)


def test_the_best_weights_have_their_own_ranges(seg_cfg):
    hooks = [dict(QUANT, start=0, freeze=1), WATCH, EXPAND, dict(type='ContractHook')]
    cfg = seg_cfg(
        custom_hooks=hooks,
        **{'default_hooks.checkpoint.save_best': 'mIoU', 'default_hooks.checkpoint.rule': 'less'},
    )
    train(cfg)
    best = next(Path(cfg.work_dir).glob('best_mIoU_*.pth'))
    ranges = trained_ranges(f'{cfg.work_dir}/compact_best.pth')
    assert ranges == trained_ranges(best)
    written = str(best).endswith('_4.pth')
    assert (ranges == trained_ranges(f'{cfg.work_dir}/compact_last.pth')) == written


def test_tools_pass_the_ranges_on(seg_cfg, street, tmp_path, capsys):
    cfg = seg_cfg(
        custom_hooks=[dict(QUANT, target='arm'), WATCH, EXPAND, dict(type='ContractHook')]
    )
    # After one batch statistics fit the images.
    cfg.model.backbone.norm_cfg = cfg.model.decode_head.norm_cfg = dict(type='BN', momentum=1.0)
    train(cfg)
    work_dir = Path(cfg.work_dir)
    cfg.custom_hooks.pop(1)
    cfg.dump(tmp_path / 'config.py')
    checkpoint = work_dir / 'iter_4.pth'
    args = [tmp_path / 'config.py', checkpoint, '--work-dir', tmp_path / 'out', '--shape', 32, 48]
    assert run('contract.py', *map(str, args))[0] == 0
    contracted = tmp_path / 'out/compact_iter_4.pth'
    assert trained_ranges(contracted) == trained_ranges(checkpoint)
    image = next(street.rglob('*leftImg8bit.png'))
    args = [work_dir / 'compact_config.py', contracted, '--out', tmp_path / 'net.onnx', '--image']
    args = [*map(str, [*args, image]), '--int8', '4']
    capsys.readouterr()
    assert run('export_onnx.py', *args) == (0, '')
    assert 'layers and ranges as trained by QuantHook' in capsys.readouterr().out
    assert (tmp_path / 'net_int8.onnx').exists()
    status, said = run('export_onnx.py', *args, '--int8-target', 'x86')
    assert status != 0
    assert 'for arm; leave the option out' in said


def test_nothing_of_it_is_in_the_compact_config(seg_cfg):
    cfg = seg_cfg(custom_hooks=[QUANT, WATCH, EXPAND, dict(type='ContractHook')])
    runner, _ = train(cfg)
    assert 'QuantHook' not in (Path(cfg.work_dir) / 'compact_config.py').read_text()
    assert not any(
        isinstance(m, nn.Conv2d) and '_conv_forward' in vars(m)
        for m in unwrap(runner.model).modules()
    )
    assert all('_apply_kernel' not in vars(u) for u in named_units(runner.model).values())


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(start=0.9), r'0 <= start <= freeze <= 1, got 0\.9 and 0\.8'),
        (dict(freeze=2), 'fractions of the training .* and 2'),
        (dict(target='avx'), "target must be one of 'x86'"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        QuantHook(**options)


def test_a_run_that_is_resumed_at_its_end_keeps_its_ranges(seg_cfg):
    """As after a kill while ContractHook was writing."""
    hooks = [dict(QUANT, start=0), EXPAND, WATCH, dict(type='ContractHook')]
    cfg = seg_cfg(custom_hooks=hooks)
    train(cfg)
    last = Path(cfg.work_dir) / 'compact_last.pth'
    expected = trained_ranges(last)
    assert expected
    last.unlink()
    train(seg_cfg(custom_hooks=hooks, resume=True))
    assert trained_ranges(last) == expected


def test_ranges_of_load_from_are_not_taken(seg_cfg):
    """They are of another training: the observed ones are used."""
    hooks = [dict(QUANT, start=0, freeze=1), WATCH]
    cfg = seg_cfg(custom_hooks=hooks)
    train(cfg)
    other = torch.load(f'{cfg.work_dir}/iter_4.pth', weights_only=False)
    other['meta']['mmexpand_int8']['ranges'] = {}
    torch.save(other, f'{cfg.work_dir}/other.pth')
    _, watch = train(seg_cfg(custom_hooks=hooks, load_from=f'{cfg.work_dir}/other.pth'))
    assert len(watch.ranges[-1]['mmexpand_int8']['ranges']) == 8


@pytest.mark.parametrize(('start', 'warned'), [(0, True), (0.75, False)])
def test_norms_that_have_seen_one_batch_are_warned_of(seg_cfg, start, warned):
    cfg = seg_cfg(custom_hooks=[dict(QUANT, start=start, freeze=1), WATCH])
    train(cfg)
    assert ('norms that have seen at most one batch' in log_of(cfg)) == warned
