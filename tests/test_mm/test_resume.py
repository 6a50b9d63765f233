"""A run that was killed while it wrote resumes from what is whole, to the same end."""

import copy
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from mmexpand.mm.launch import build_runner
from mmexpand.mm.resume import is_whole
from mmexpand.surgery.checkpoint import CheckpointError, load_checkpoint
from tests.runs import train


def cut(path, length=None):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 if length is None else length])


@pytest.fixture
def trained(seg_cfg):
    """The config and work dir of a run of 6 iterations, and its last weights."""
    cfg = seg_cfg(**{'train_cfg.max_iters': 6})
    train(cfg)
    return cfg, Path(cfg.work_dir), load_checkpoint(f'{cfg.work_dir}/iter_6.pth')['state_dict']


DAMAGE = {
    'half of the latest': (lambda d: cut(d / 'iter_6.pth'), 'iter_4.pth'),
    'nothing of the latest': (lambda d: cut(d / 'iter_6.pth', 0), 'iter_4.pth'),
    'all but a byte of it': (lambda d: cut(d / 'iter_6.pth', -1), 'iter_4.pth'),
    'the latest is gone': (lambda d: (d / 'iter_6.pth').unlink(), 'iter_4.pth'),
    'two of them': (lambda d: [cut(d / f'iter_{n}.pth') for n in (6, 4)], 'iter_2.pth'),
    'an empty pointer': (lambda d: cut(d / 'last_checkpoint', 0), 'iter_6.pth'),
    'half a pointer': (lambda d: cut(d / 'last_checkpoint', -6), 'iter_6.pth'),
}


@pytest.mark.parametrize(('damage', 'expected'), DAMAGE.values(), ids=DAMAGE)
def test_the_latest_whole_checkpoint_is_resumed_to_the_same_end(seg_cfg, trained, damage, expected):
    _, work_dir, weights = trained
    damage(work_dir)
    cfg = seg_cfg(resume=True, **{'train_cfg.max_iters': 6})
    runner = train(cfg)
    log = max(work_dir.glob('*/*.log'), key=os.path.getmtime).read_text()
    assert f'resuming from {work_dir / expected}' in log
    assert f'resumed epoch: 0, iter: {expected[5]}' in log
    assert runner.iter == 6
    end = load_checkpoint(work_dir / 'iter_6.pth')['state_dict']
    assert list(end) == list(weights)
    for name, value in weights.items():
        assert torch.equal(end[name], value), name
    assert is_whole(work_dir / 'iter_6.pth')
    assert is_whole(work_dir)  # DeepSpeed's checkpoints are folders.


@pytest.mark.parametrize('damage', ['all but a byte of it', 'the latest is gone'])
def test_a_tool_passes_over_it_too(seg_cfg, damage):
    """Which looks at checkpoints before there is a Runner; of a training without our hooks, too."""
    cfg = seg_cfg(custom_hooks=[], **{'train_cfg.max_iters': 6})
    train(copy.deepcopy(cfg))
    work_dir = Path(cfg.work_dir)
    DAMAGE[damage][0](work_dir)
    cfg.resume = True
    runner = build_runner(cfg, ('train', 'val'))
    runner.train()
    log = max(work_dir.glob('*/*.log'), key=os.path.getmtime).read_text()
    assert f'resuming from {work_dir / "iter_4.pth"}' in log
    assert runner.iter == 6


def test_a_moved_work_dir_is_resumed_at_its_latest(seg_cfg, trained):
    _, work_dir, _ = trained
    moved = work_dir.with_name('moved')
    shutil.move(work_dir, moved)
    cfg = seg_cfg(resume=True, work_dir=str(moved), **{'train_cfg.max_iters': 8})
    assert train(cfg).iter == 8
    log = max(moved.glob('*/*.log'), key=os.path.getmtime).read_text()
    assert 'resumed epoch: 0, iter: 6' in log


def test_no_whole_checkpoint_is_a_sentence(seg_cfg, trained):
    _, work_dir, _ = trained
    for path in work_dir.glob('iter_*.pth'):
        cut(path)
    with pytest.raises(CheckpointError, match=r'no complete checkpoint.*remove .*last_checkpoint'):
        train(seg_cfg(resume=True, **{'train_cfg.max_iters': 6}))


def test_mmengines_own_choice_is_left_alone(seg_cfg, trained):
    _, work_dir, _ = trained
    train(seg_cfg(resume=True, **{'train_cfg.max_iters': 8}))
    log = max(work_dir.glob('*/*.log'), key=os.path.getmtime).read_text()
    assert 'Auto resumed from the latest checkpoint' in log
    assert 'missing or truncated' not in log


def test_no_part_of_a_checkpoint_is_taken_for_whole(trained):
    path = trained[1] / 'iter_6.pth'
    assert is_whole(path)
    content, rng = path.read_bytes(), random.Random(0)
    for length in rng.sample(range(len(content)), 100):
        path.write_bytes(content[:length])
        assert not is_whole(path), length
    # The file system gave its blocks, and lost their content: as after a power failure.
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(512) + content[middle + 512 :])
    assert not is_whole(path)


def test_an_empty_pointer_finds_no_other_runs_checkpoint(seg_cfg, trained, tmp_path, monkeypatch):
    _, work_dir, _ = trained
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    shutil.copy(work_dir / 'iter_6.pth', elsewhere / 'iter_99.pth')
    monkeypatch.chdir(elsewhere)
    cut(work_dir / 'last_checkpoint', 0)
    train(seg_cfg(resume=True, **{'train_cfg.max_iters': 6}))
    log = max(work_dir.glob('*/*.log'), key=os.path.getmtime).read_text()
    assert f'resuming from {work_dir / "iter_6.pth"}' in log
