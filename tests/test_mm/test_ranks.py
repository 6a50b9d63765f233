"""Ranks start alike, whatever each draws, and none waits for another for ever."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from mmexpand.surgery.checkpoint import load_checkpoint

WORKER = Path(__file__).with_name('ranks_worker.py')


def test_two_ranks_that_draw_differently_train_one_network(street, tmp_path):
    """From a compact checkpoint, with a loss that waits for the other rank's."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2']
    command += [f'--master_port={get_free_port()}', str(WORKER), str(street), str(tmp_path)]
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env=env
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    ours, theirs = (torch.load(tmp_path / f'factors_{rank}.pth') for rank in (0, 1))
    assert sum('factors' in name for name in ours) > 6
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    verified = load_checkpoint(tmp_path / 'work_dir/compact_last.pth')['meta']['mmexpand']
    assert verified['verified_on']['auxiliary'] == 'on captured input'
