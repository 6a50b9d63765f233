"""The tool that exports a network of every family, and its page."""

import json
from pathlib import Path

import mmdet
import mmseg
import pytest

pytest.importorskip('onnxruntime')

from tests.test_tools.test_zoo import _without_versions
from tests.tools_in_process import TOOLS, load, run_apart

ROOT = Path(__file__).parents[2]
RUN = """
import json
import sys
sys.path.insert(0, sys.argv[1])
import zoo_export
print(json.dumps(zoo_export.outcome(sys.argv[2])))
"""


@pytest.fixture(scope='module')
def zoo_export():
    return load('analysis_tools/zoo_export.py')


FAMILIES = [('mmseg/cgnet', 'works'), ('mmdet/faster_rcnn', 'refused')]


@pytest.mark.parametrize(('family', 'status'), FAMILIES)
def test_a_family_is_exported(tmp_path, family, status):
    (tmp_path / 'run.py').write_text(RUN)
    done = run_apart(tmp_path / 'run.py', TOOLS / 'analysis_tools', family)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result['status'] == status, result
    if status == 'works':
        assert 0 < result['error_raw'] < 1e-3
    else:
        assert 'has two stages' in result['error']


def test_the_page_lists_every_outcome(zoo_export):
    results = [
        dict(family='a', config='c', side=64, status='works', error_raw=1e-6, agreement=1.0),
        dict(family='mmdet/x', status='refused', config='x', side=64, error='two | stages'),
        dict(family='mmdet/y', status='failed', error='took more than 1 s'),
        dict(family='mmdet/w', status='stock', error='no such op'),
    ]
    text = zoo_export.page(results, ['mmdet/z'])
    for row in ('| Works | 1 |', '| Works with `--raw` | 0 |', '| Unsupported | 2 |'):
        assert row in text.splitlines()
    assert '| `c` | 64 | 1.0e-06 | 100.00% |  |' in text
    assert '| `x` | 64 |  |  | two \\| stages |' in text
    assert '| `mmdet/y` |  |  |  | took more than 1 s |' in text
    assert text.endswith('## Not tried yet\n\nmmdet/z\n')


@pytest.mark.skipif(
    (mmdet.__version__, mmseg.__version__) != ('3.3.0', '1.2.2'),
    reason='the page is of the families of mmdet 3.3.0 and mmsegmentation 1.2.2',
)
def test_the_committed_page_is_of_the_committed_results(zoo_export):
    order = zoo_export.zoo_network.families()
    paths = (ROOT / 'resources/zoo_export').glob('*.json')
    found = {
        result['family']: result for path in paths for result in [json.loads(path.read_text())]
    }
    results = [found[family] for family in order if family in found]
    text = zoo_export.page(results, [family for family in order if family not in found])
    assert len(results) > 20
    assert _without_versions(text) == _without_versions(
        (ROOT / 'docs/exported_networks.md').read_text()
    )
