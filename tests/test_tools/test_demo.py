import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
from mmengine.config import Config

import mmexpand
from mmexpand.mm.compact_config import make_compact_config
from mmexpand.mm.models import build_expanded_model
from mmexpand.mm.runtime import prepare_cpu
from tests.tools_in_process import run_apart

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools/demo'))
import run_demo
from draw_cityscapes import draw_cityscapes

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs/unet/unet-s5-d16_expand-cl-r4_fcn_4xb4-160k_cityscapes-512x1024.py'


def tool(path, *args):
    command = [sys.executable, '-W', 'ignore', ROOT / path, *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Configs and checkpoints of a training, expanded and compact."""
    root = tmp_path_factory.mktemp('trained')
    draw_cityscapes(root / 'data', num_train=1, num_val=3, size=(96, 80))
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(
        {
            'model.backbone.base_channels': 2,
            'model.decode_head.in_channels': 2,
            'model.decode_head.channels': 2,
            'model.auxiliary_head.in_channels': 4,
            'model.auxiliary_head.channels': 2,
        }
    )
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(root / 'data')
        loader.dataset.pipeline[1].scale = (96, 80)
    prepare_cpu(cfg)
    torch.manual_seed(0)
    model = build_expanded_model(cfg).eval()
    compact = mmexpand.contract(model)
    for name, network in (('expanded', model), ('compact', compact)):
        torch.save(dict(meta={}, state_dict=network.state_dict()), root / f'{name}.pth')
    cfg.dump(root / 'config.py')
    make_compact_config(copy.deepcopy(cfg)).dump(root / 'compact_config.py')
    return root


def evaluate(config, checkpoint, folder, *without):
    args = [config, checkpoint, '--work-dir', folder, '--out', folder / 'metrics.json', *without]
    return tool('tools/demo/evaluate_stock.py', *args)


def test_stock_evaluation_without_mmexpand(trained, tmp_path):
    result = evaluate(
        trained / 'compact_config.py', trained / 'compact.pth', tmp_path, '--without', 'mmexpand'
    )
    assert result.returncode == 0, result.stderr
    assert 'mmexpand cannot be imported in this process' in result.stdout
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert {'mIoU', 'mRecall', 'mPrecision'} <= metrics.keys()
    assert 0 < metrics['aAcc'] < 100


@pytest.mark.parametrize(
    ('config', 'checkpoint', 'message'),
    [
        ('compact_config.py', 'expanded.pth', 'unexpected key in source state_dict'),
        ('config.py', 'compact.pth', r'mmexpand'),
    ],
)
def test_stock_evaluation_takes_nothing_of_ours(trained, tmp_path, config, checkpoint, message):
    result = evaluate(trained / config, trained / checkpoint, tmp_path, '--without', 'mmexpand')
    assert result.returncode != 0
    assert message in result.stderr
    assert not (tmp_path / 'metrics.json').exists()


def test_pictures_of_results(trained, tmp_path):
    out = tmp_path / 'pictures'
    args = [trained / 'config.py', trained / 'expanded.pth', '--out-dir', out, '--num', '2']
    result = run_apart(ROOT / 'tools/analysis_tools/browse_results.py', *args)
    assert result.returncode == 0, result.stderr
    pictures = sorted(out.iterdir())
    assert [p.name for p in pictures] == [
        f'0000{i}_drawnstadt_00000{i}_000019_leftImg8bit.png' for i in range(2)
    ]
    for path in pictures:
        picture = cv2.imread(str(path))
        assert picture.shape == (80, 2 * 96, 3)
        truth, prediction = picture[:, :96], picture[:, 96:]
        assert (truth != prediction).any()


def write_log(work_dir, losses, metric):
    folder = work_dir / '20240101_000000/vis_data'
    folder.mkdir(parents=True)
    lines = [dict(loss=loss, time=0.5, lr=0.1, step=10 * (i + 1)) for i, loss in enumerate(losses)]
    lines.append(dict(mIoU=metric, time=0.1, step=10 * len(losses)))
    (folder / 'scalars.json').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def test_curves(tmp_path):
    write_log(tmp_path / 'one', [3.0, 2.0, 1.0], 40.0)
    write_log(tmp_path / 'two', [2.0, 1.5, 1.0], 50.0)
    plot = ROOT / 'tools/analysis_tools/plot_curves.py'
    args = [tmp_path / 'one', tmp_path / 'two', '--out', tmp_path / 'curves.png']
    result = run_apart(plot, *args)
    assert result.returncode == 0, result.stderr
    assert cv2.imread(str(tmp_path / 'curves.png')).std() > 1
    result = run_apart(plot, *args, '--keys', 'losses')
    assert "one has no 'losses'; it logged loss, lr, mIoU, step, time" in result.stderr
    result = run_apart(plot, tmp_path, '--out', tmp_path / 'no.png')
    assert 'name the work dir of a training' in result.stderr
    assert not (tmp_path / 'no.png').exists()
    assert run_demo.steps_a_second(tmp_path / 'one') == 2


def test_demo_stops_at_a_failing_step(tmp_path, capsys):
    code = 'print("Iter(train) [1/2] lr: 0.1 loss: 3.5 loss_a: 1"); print("other"); 1 / 0'
    log = tmp_path / 'step.log'
    with pytest.raises(run_demo.StepError, match='exit code 1') as caught:
        run_demo.run([sys.executable, '-c', code], log)
    assert sys.executable in str(caught.value)
    assert 'ZeroDivisionError' in str(caught.value)
    assert 'other' in log.read_text()
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith('Iter(train) [1/2] loss: 3.5')


def test_demo_clears_its_own_folder_only(tmp_path):
    out = tmp_path / 'out'
    run_demo.prepare(out)
    (out / 'table.md').write_text('old')
    run_demo.prepare(out)
    assert [p.name for p in out.iterdir()] == [run_demo.MARKER]
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/file').write_text('mine')
    with pytest.raises(FileExistsError, match='is not the folder of a demo'):
        run_demo.prepare(tmp_path / 'mine')
    assert (tmp_path / 'mine/file').read_text() == 'mine'


def test_demo_counts_what_it_shows(tmp_path):
    """Parameters and MACs of YOLO-LITE, by hand."""
    image = tmp_path / 'image.png'
    cv2.imwrite(str(image), np.zeros((60, 80, 3), np.uint8))
    size, params, macs = run_demo.count(run_demo.TASKS[0], image)
    assert size == (160, 160)
    channels = [3, 16, 32, 64, 128, 128]
    pairs = list(itertools.pairwise(channels))
    head = 9 * 128 * 256 * 25 + 256 * 125 * 25
    compact = sum(9 * m * n * (160 // 2**i) ** 2 for i, (m, n) in enumerate(pairs)) + head
    assert macs[1] == compact
    assert params == (4_484_253, 572_317)
    # The first 1x1 sees the padded input, and every factor its own number of pixels.
    layerwise = head + sum(
        4 * m * m * (s + 2) ** 2 + 9 * 16 * m * n * s**2 + 4 * n * n * s**2
        for (m, n), s in zip(pairs, (160, 80, 40, 20, 10), strict=True)
    )
    assert macs[0] == layerwise


def test_table():
    text = run_demo.table({'A': dict(one='1', two='22'), 'B': dict(one='333', two='4')})
    assert text.splitlines() == [
        '|     |  A |   B |',
        '| --- | -- | --- |',
        '| one |  1 | 333 |',
        '| two | 22 |   4 |',
    ]
