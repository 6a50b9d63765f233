"""Compact-size gradients give what plain DDP gives, with fewer bytes: on 2 and 4 processes."""

import json
from pathlib import Path

import pytest
from torch import nn

import mmexpand
from mmexpand import ExpandConfig
from mmexpand.surgery.distributed import can_reduce_compact
from tests.processes import run_workers

WORKER = Path(__file__).with_name('ddp_worker.py')


BLOCKS = ['shortcut', 'orepa', 'do', 'rep', 'ac', 'transposed']
CASES = {
    2: [
        *('simple', 'clip', 'sum', 'unused', 'frozen', 'static', 'views', 'attention'),
        *('checkpointed', 'reentrant'),
        *BLOCKS,
    ],
    4: ['simple'],
}


@pytest.fixture(scope='module')
def results() -> dict[int, dict]:
    return {processes: run(['empty', *cases], processes) for processes, cases in CASES.items()}


def run(cases: list[str], processes: int) -> dict:
    done = run_workers(WORKER, *cases, processes=processes, timeout=900)
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith('{'):
            found.update(json.loads(line))
    return found


@pytest.mark.parametrize(
    ('processes', 'case'), [(n, case) for n, cases in CASES.items() for case in cases]
)
def test_same_result_with_compact_bytes(results, processes, case):
    result = results[processes][case]
    assert result['factors_identical']
    assert result['worst_loss_difference'] < 1e-10
    assert result['factors_difference'] < 1e-10
    assert abs(result['first_loss'] - result['last_loss']) > 1e-3, 'nothing was learnt'
    assert result['state_dict_keys']
    assert result['copies']
    if case != 'static':
        expected = result['bytes_of_compact_network']
        assert result['bytes_compact'] == pytest.approx(expected, rel=0.01)
        # Of a chain at r = 4; other blocks hold less.
        assert result['bytes_plain'] > (1.05 if case in ('rep', 'ac') else 2) * expected


def test_an_empty_batch_on_a_rank_lets_none_wait(results):
    assert results[2]['empty'] == dict(unanchored=True, anchored=True, same=True)


def test_a_layerwise_unit_keeps_plain_gradients():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert not can_reduce_compact(net)
    mmexpand.expand_(net, ExpandConfig(method='cl', forward='auto'))
    assert can_reduce_compact(net)
    net[0].forward_order = 'layerwise'
    assert not can_reduce_compact(net)
