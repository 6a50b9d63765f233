"""The zoo's tool: a family's network, what a crash or a hang costs, and the page."""

import json
import os
import signal
import time
from pathlib import Path

import mmdet
import mmseg
import pytest

from tests.tools_in_process import TOOLS, load, run_apart

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def zoo():
    return load('analysis_tools/zoo.py')


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import zoo, zoo_network
{before}
zoo.run_family(sys.argv[2], Path(sys.argv[3]), 300)
"""
WRONG = """
expand = zoo_network.mmexpand.expand_
def wrong(model, config):
    plan = expand(model, config)
    model.backbone.stem.conv.conv.factors[1].weight.data *= 1.1
    return plan
zoo_network.mmexpand.expand_ = wrong
"""


def run(family, path, before=''):
    """In a process that has run nothing yet: torch's threads do not outlive the fork."""
    script = path.with_name('run.py')
    script.write_text(RUN.format(before=before))
    done = run_apart(script, TOOLS / 'analysis_tools', family, path)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(path.read_text())


def test_families_and_their_smallest_configs(zoo):
    families = zoo.zoo_network.families()
    assert {'mmdet/yolox', 'mmdet/dcn', 'mmseg/unet', 'mmseg/hrnet'} <= set(families)
    first = [zoo.zoo_network.candidates(family)[0] for family in ('mmdet/yolox', 'mmdet/dcn')]
    assert first == [
        'yolox_nano_8xb8-300e_coco.py',
        'faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py',
    ]


def test_a_network_is_exact(tmp_path):
    result = run('mmdet/yolox', tmp_path / 'x.json')
    assert result['status'] == 'exact', result
    assert result['config'] == 'mmdet::yolox/yolox_nano_8xb8-300e_coco.py'
    assert result['layers'] == sum(result['verified_on'].values()) > 100
    assert result['params_after'] > result['params_before']
    assert 0 < result['error_expanded'] < 1e-4
    assert 0 < result['error_contracted'] < 1e-4
    assert 0 < result['error_weights'] < 1e-5


def test_a_network_that_is_not_preserved_fails(tmp_path):
    result = run('mmdet/yolox', tmp_path / 'x.json', WRONG)
    assert result['status'] == 'failed'
    assert 'VerificationError' in result['error']


def test_a_folder_without_a_model(tmp_path):
    result = run('mmdet/common', tmp_path / 'x.json')
    assert (result['status'], result['error']) == (
        'stock',
        'no config of this folder has a model',
    )


@pytest.mark.parametrize(
    ('stage', 'status'), [('building and running stock', 'stock'), ('contracting', 'failed')]
)
def test_a_crash_and_a_hang_cost_one_line(zoo, tmp_path, monkeypatch, stage, status):
    def broken(end):
        def main(family, path):
            zoo.zoo_network.log_of(path).write_text(f'stage: {stage}\n')
            end()

        return main

    for end, limit, words in (
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 60, 'ended by SIGKILL'),
        (lambda: time.sleep(60), 1, 'took more than 1 s'),
        (lambda: os._exit(3), 60, 'exit status 3'),
    ):
        monkeypatch.setattr(zoo.zoo_network, 'main', broken(end))
        path = tmp_path / f'{words}.json'
        zoo.run_family('mmdet/yolox', path, limit)
        result = json.loads(path.read_text())
        assert (result['status'], result['error']) == (status, f'{words} (stage: {stage})')


def results():
    return [
        json.loads(path.read_text()) for path in sorted((ROOT / 'resources/zoo').glob('*.json'))
    ]


def test_the_page_says_what_was_found(zoo):
    exact = next(result for result in results() if result['status'] == 'exact')
    stock = dict(family='mmdet/x', status='stock', error='no | such op')
    failed = dict(family='mmdet/y', status='failed', error='took more than 1 s')
    text = zoo.page([exact, stock, failed], ['mmdet/z'])
    stock_fails = '| stock network does not run on this machine | 1 |'
    for row in ('| exact | 1 |', '| failed | 1 |', stock_fails, '| not tried | 1 |'):
        assert row in text.splitlines()
    assert f'| `{exact["config"]}` | {exact["side"]} | {exact["layers"]} |' in text
    assert '| mmdet/x | no \\| such op |  |' in text
    assert '| mmdet/y | took more than 1 s |  |' in text
    assert text.endswith('## Not tried yet\n\nmmdet/z\n')


@pytest.mark.skipif(
    (mmdet.__version__, mmseg.__version__) != ('3.3.0', '1.2.2'),
    reason='the page is of the families of mmdet 3.3.0 and mmsegmentation 1.2.2',
)
def test_the_committed_page_is_of_the_committed_results(zoo):
    found = results()
    done = {result['family'] for result in found}
    missing = [family for family in zoo.zoo_network.families() if family not in done]
    order = zoo.zoo_network.families()
    text = zoo.page(sorted(found, key=lambda result: order.index(result['family'])), missing)
    committed = (ROOT / 'docs/supported_networks.md').read_text()
    assert len(found) > 20
    assert _without_versions(text) == _without_versions(committed)


def _without_versions(text):
    before, found, after = text.partition('a CPU with these versions: ')
    assert found
    return before, after.partition('\n')[2]
