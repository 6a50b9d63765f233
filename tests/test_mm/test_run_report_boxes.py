"""The pictures of a detector: boxes where the data set has them, in pixels of the image."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools/demo'))
pytest.importorskip('jinja2')
pytest.importorskip('plotly')
pytest.importorskip('mmdet')

from draw_voc import draw_voc
from mmdet.registry import DATASETS
from mmengine.config import Config

from mmexpand.mm import run_report
from mmexpand.mm.contraction import contract_without_data, write_compact_checkpoint
from mmexpand.mm.models import build_expanded_model
from mmexpand.mm.runtime import prepare_cpu
from mmexpand.report import gallery

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs/demo/yolo-lite_expand-cl-r4_2xb8-400iters_drawn-voc-160x160.py'


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory):
    """Files of a training that left its network untrained."""
    root = tmp_path_factory.mktemp('boxes')
    draw_voc(root / 'voc', num_train=4, num_test=6, size=(200, 120))
    cfg = Config.fromfile(CONFIG)
    cfg.val_dataloader.dataset.data_root = str(root / 'voc')
    prepare_cpu(cfg)
    torch.manual_seed(0)
    result = contract_without_data(build_expanded_model(cfg), 160, 160)
    write_compact_checkpoint(result, root / 'compact_last.pth', cfg, {})
    return root, cfg


def report_of(work_dir, monkeypatch):
    root, cfg = work_dir
    reports = []
    monkeypatch.setattr(run_report, 'render_run', lambda report: reports.append(report) or '')
    _, notes = run_report.write_run_report(root, cfg)
    assert [note.split(':')[0] for note in notes] == ['Curves']
    return reports[0]


def test_boxes_of_the_truth_are_the_data_sets(work_dir, monkeypatch):
    shown = report_of(work_dir, monkeypatch).gallery
    dataset = DATASETS.build(work_dir[1].val_dataloader.dataset)
    assert len(shown.pictures) == len(dataset) == 6
    for index, picture in enumerate(shown.pictures):
        instances = dataset.get_data_info(index)['instances']
        wanted = [(*i['bbox'], i['bbox_label']) for i in instances if not i['ignore_flag']]
        found = [(*box.corners, box.label) for box in picture.truth.boxes]
        assert (picture.width, picture.height) == (200, 120)
        assert np.array(found) == pytest.approx(np.array(wanted), abs=0.11)
        # A network that says nothing misses all.
        assert picture.error == (1 if wanted else 0)
        assert not picture.prediction.boxes


def test_predictions_are_in_pixels_of_the_image(work_dir, monkeypatch):
    monkeypatch.setattr(gallery, 'MIN_SCORE', 0)
    for picture in report_of(work_dir, monkeypatch).gallery.pictures:
        corners = np.array([box.corners for box in picture.prediction.boxes])
        assert len(corners) > 10
        assert (corners >= 0).all()
        assert (corners[:, [0, 2]] <= 200).all()
        assert (corners[:, [1, 3]] <= 120).all()
        # The network sees 160x160 pixels: what it says is stretched.
        assert corners[:, 2].max() > 180
        assert corners[:, 3].max() > 100


def test_costs_count_the_whole_network_and_every_layer(work_dir, monkeypatch):
    cost = report_of(work_dir, monkeypatch).cost
    assert (cost.params_compact, cost.params_expanded) == (572_317, 4_484_253)
    assert cost.image == (160, 160)
    # As tests/test_tools/test_demo.py has counted them by hand.
    assert [round(macs / 1e5) for macs in cost.macs[:2]] == [1225, 19805]
    by_layer = [sum(row.macs[kind] for row in cost.layers) for kind in range(3)]
    head = cost.macs[0] - by_layer[0]
    assert head == 9 * 128 * 256 * 25 + 256 * 125 * 25
    assert tuple(head + macs for macs in by_layer) == cost.macs
    assert cost.skipped == {'not included': ['bbox_head.convs.0.conv', 'bbox_head.convs.1']}
