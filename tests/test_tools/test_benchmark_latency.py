import time

import pytest

pytest.importorskip('onnxruntime')
from tests.conftest import small_config
from tests.tools_in_process import load, run

TOOL = 'analysis_tools/benchmark_latency.py'


def test_a_row_for_every_runtime_and_thread_count(street, tmp_path, capsys):
    small_config(street, tmp_path / 'work_dir').dump(tmp_path / 'config.py')
    options = ['--shape', 32, 48, '--runs', 5, '--threads', 1, 2]
    assert run(TOOL, tmp_path / 'config.py', *options) == (0, '')
    rows = [line.split(' | ') for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [(row[0], row[1]) for row in rows] == [
        (f'| {threads}', runtime) for threads in (1, 2) for runtime in ('PyTorch', 'ONNX Runtime')
    ]
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in rows)


def test_medians_of_runs_that_take_turns(monkeypatch):
    tool = load(TOOL)
    order, now = [], [0.0]
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])

    def function(name, seconds):
        def call():
            order.append(name)
            now[0] += next(seconds)

        return call

    slow_once = iter([9, 1, 1, 5, 1, 1])
    steady = iter([2] * 6)
    found = tool.measure({'a': function('a', slow_once), 'b': function('b', steady)}, 5)
    assert found == {'a': 1000, 'b': 2000}
    assert order == ['a', 'b'] * 6


def test_a_size_that_does_not_fit_is_a_sentence(street, tmp_path):
    small_config(street, tmp_path / 'work_dir').dump(tmp_path / 'config.py')
    status, words = run(TOOL, tmp_path / 'config.py', '--shape', 33, 48)
    assert status == 1
    assert 'cannot be run on images of 33x48' in words
