"""tools/analysis_tools/study_int8.py evaluates the files of a study's runs."""

import json

import pytest

pytest.importorskip('onnxruntime')

from mmexpand.study import Run
from mmexpand.study.run import train, write_json
from tests.tools_in_process import TOOLS, run_apart


def test_a_classifiers_runs_are_evaluated_in_int8(write_study, tmp_path):
    study = write_study()
    for arm in ('compact', 'cl'):
        once = Run(study.arm(arm), 0.1, 0)
        write_json(train(study, once), study.result_path(once))
    tool = TOOLS / 'analysis_tools/study_int8.py'
    options = '--images', '16', '--drop', '0', '--targets', 'x86', 'arm'
    done = run_apart(tool, tmp_path / 'small.py', *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = done.stdout.strip().splitlines()[-4:]
    assert table[0].startswith(
        '| arm | learning rate | seeds | PyTorch | float32 | int8 | int8_arm | int8_auto |'
    )
    for arm in ('cl', 'compact'):
        found = json.loads((tmp_path / f'results/int8/{arm}_lr0.1_seed0.json').read_text())
        trained = json.loads((tmp_path / f'results/{arm}/lr0.1_seed0.json').read_text())
        scores = {name: metrics['accuracy'] for name, metrics in found['metrics'].items()}
        assert scores['PyTorch'] == scores['float32'] == trained['test']['accuracy']
        assert scores['int8'] == pytest.approx(scores['float32'], abs=15)
        assert scores['int8_auto'] == scores['float32']
        assert any(f'| {arm} | 0.1 | 1 | {scores["PyTorch"]:.2f} |' in line for line in table)
