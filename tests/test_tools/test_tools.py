"""The command line, as a user types it: two processes, resuming, testing, contracting."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from tests.tools_in_process import run_apart

TOOLS = Path(__file__).parents[2] / 'tools'
ENV = dict(
    os.environ,
    OMP_NUM_THREADS='1',
    PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
)


def call(*command, fails=False) -> str:
    command = list(map(str, command))
    if command[0].endswith('.py'):
        done = run_apart(*command)
    else:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=ENV, timeout=900
        )
    assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope='module')
def trained(tmp_path_factory, street):
    """An expanded U-Net, trained on two processes by dist_train.sh."""
    from tests.conftest import small_config

    root = tmp_path_factory.mktemp('trained')
    config = root / 'small.py'
    cfg = small_config(street, root / 'work_dir')
    cfg.model.backbone.norm_cfg.type = 'SyncBN'
    cfg.sync_bn = 'torch'
    cfg.dump(config)
    ENV['PORT'] = str(get_free_port())
    output = call('bash', TOOLS / 'dist_train.sh', config, 2)
    return config, root / 'work_dir', output


def metric(output: str) -> float:
    return float(re.findall(r'mIoU: (\S+)', output)[-1])


def test_two_processes_train_and_contract(trained):
    _, work_dir, output = trained
    assert 'Gradients are reduced at the size of the compact network' in output
    assert 'compact_last.pth: 3 layers contracted' in output
    compact = torch.load(work_dir / 'compact_last.pth', weights_only=True)
    assert compact['meta']['mmexpand']['max_error'] < 1e-4
    text = (work_dir / 'compact_config.py').read_text()
    assert 'ExpandHook' not in text
    assert 'device_ids' not in text


def test_every_kind_of_checkpoint_tests_the_same(trained):
    config, work_dir, _ = trained
    last, compact = work_dir / 'iter_4.pth', work_dir / 'compact_last.pth'
    results = [
        metric(call(TOOLS / 'test.py', some_config, checkpoint, '--work-dir', work_dir / 'test'))
        for some_config, checkpoint in (
            (config, last),
            (config, compact),
            (work_dir / 'compact_config.py', compact),
            (work_dir / 'compact_config.py', last),
        )
    ]
    assert len(set(results)) == 1


def test_dist_test(trained):
    config, work_dir, _ = trained
    one = metric(call(TOOLS / 'test.py', config, work_dir / 'iter_4.pth'))
    ENV['PORT'] = str(get_free_port())
    output = call('bash', TOOLS / 'dist_test.sh', config, work_dir / 'iter_4.pth', 2)
    assert metric(output) == one


def test_a_killed_run_resumes(trained, tmp_path):
    config, work_dir, _ = trained
    shutil.copy(work_dir / 'iter_2.pth', tmp_path)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    output = call(TOOLS / 'train.py', config, '--work-dir', tmp_path, '--resume')
    assert 'resumed epoch: 0, iter: 2' in output
    assert (tmp_path / 'compact_last.pth').exists()


def test_contract_gives_what_the_hook_gave(trained, tmp_path):
    config, work_dir, _ = trained
    hooked = torch.load(work_dir / 'compact_last.pth', weights_only=True)['state_dict']
    for options in ([], ['--shape', '32', '48']):
        output = call(
            TOOLS / 'contract.py', config, work_dir / 'iter_4.pth', '--work-dir', tmp_path, *options
        )
        assert 'layers contracted' in output
        ours = torch.load(tmp_path / 'compact_iter_4.pth', weights_only=True)
        assert all(torch.equal(ours['state_dict'][name], hooked[name]) for name in hooked)
        assert ours['meta']['dataset_meta']['classes'][0] == 'road'
        (tmp_path / 'compact_iter_4.pth').unlink()


def test_plan_tries_an_iteration(trained):
    """As the config says, and for another block; nothing of it stays."""
    config, work_dir, _ = trained
    before = sorted(work_dir.rglob('*'))
    for options in ((), ('--method', 'repvgg', '--include', 'backbone')):
        output = call(TOOLS / 'plan.py', config, '--shape', '32', '48', '--dry-run', *options)
        assert re.search(
            r'Dry run: one iteration trained \(loss [\d.]+, at most [\d,]+ MiB', output
        )
        assert ('repvgg' in output) == bool(options)
    assert sorted(work_dir.rglob('*')) == before


def test_plan_takes_the_name_of_a_packages_config():
    name = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'
    options = ('--include', 'backbone.stem', '--method', 'cl', '--shape', '64', '64')
    assert 'backbone.stem.conv.conv' in call(TOOLS / 'plan.py', name, *options)
    output = call(TOOLS / 'plan.py', name.replace('tiny', 'tny'), *options, fails=True)
    assert 'yolox_tny_8xb8-300e_coco.py" does not exist' in output


def test_plan_shows_layers_and_costs(trained):
    output = call(TOOLS / 'plan.py', trained[0], '--shape', '32', '48')
    assert 'backbone.encoder.0.0.convs.0.conv' in output
    assert '6x3x1x1 8x6x3x3 4x8x1x1' in output
    assert re.search(r'^    decode_head \(3 layers\): not included$', output, re.MULTILINE)
    shown = re.search(r'^Expanded layers.*?^MACs of the', output, re.MULTILINE | re.DOTALL)[0]
    assert max(map(len, shown.splitlines())) <= 100
    assert 'folded' in output
    output = call(TOOLS / 'plan.py', trained[0], '--method', 'fc', fails=True)
    assert 'nothing to expand' in output
