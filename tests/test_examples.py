"""The examples run as they are, from start to end."""

import json
import re
from pathlib import Path

import torch

from tests.tools_in_process import run_apart

EXAMPLES = Path(__file__).parents[1] / 'examples'


def accuracies(output):
    return dict(re.findall(r'(expanded|deployed): \d+ parameters, accuracy (\S+)', output))


def test_the_script_trains_and_saves_the_compact_network(tmp_path):
    done = run_apart(EXAMPLES / 'plain_pytorch.py', '--out', tmp_path / 'net.pth', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = accuracies(done.stdout)
    assert found['expanded'] == found['deployed']
    assert float(found['deployed']) > 0.8
    assert '0.weight' in torch.load(tmp_path / 'net.pth', weights_only=True)


def test_the_notebook_runs(tmp_path):
    """Its code cells, one after another; a notebook is committed without outputs."""
    notebook = json.loads((EXAMPLES / 'compact_network.ipynb').read_text())
    code = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
    assert not any(cell['outputs'] or cell['execution_count'] for cell in code)
    # Jupyter finds modules beside the notebook.
    start = f'import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\n'
    (tmp_path / 'notebook.py').write_text(start + '\n'.join(cell['source'] for cell in code))
    done = run_apart(tmp_path / 'notebook.py', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = accuracies(done.stdout)
    assert found['expanded'] == found['deployed']
    assert float(found['deployed']) > 0.8
