"""Ranks start alike, whatever each draws, and none waits for another for ever."""

import re
from pathlib import Path

import pytest
import torch

from mmexpand.surgery.checkpoint import load_checkpoint
from tests.processes import run_workers

WORKER = Path(__file__).with_name('ranks_worker.py')


def test_two_ranks_quantise_a_compact_network_with_the_same_statistics(street, tmp_path):
    run_workers(WORKER, street, tmp_path, 'quant')
    ours, theirs = (torch.load(tmp_path / f'factors_{rank}.pth') for rank in (0, 1))
    assert any(name.endswith('running_var') for name in ours)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize('hooks', ['one', 'norms', 'layerwise', 'factors'])
def test_two_ranks_that_draw_differently_train_one_network(street, tmp_path, hooks):
    """From a compact checkpoint, with a loss that waits for the other rank's."""
    run_workers(WORKER, street, tmp_path, hooks)
    ours, theirs = (torch.load(tmp_path / f'factors_{rank}.pth') for rank in (0, 1))
    assert sum(('repvgg' if hooks == 'norms' else 'factors') in name for name in ours) > 6
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    for rank in (0, 1):
        words = (tmp_path / f'start_{rank}.txt').read_text()
        assert words.startswith('4 of 4 expanded layers start from given weights; on the first')
        # Norms are anchored at the batches of both ranks, and take the statistics of their own.
        found = [float(value) for value in re.findall(r'([\d.]+e[+-]\d+) in', words)]
        assert found[0] < 1e-4
        assert (found[1] > 1e-4) == (hooks == 'norms')
    verified = load_checkpoint(tmp_path / 'work_dir/compact_last.pth')['meta']['mmexpand']
    assert verified['verified_on']['auxiliary'] == 'on captured input'
