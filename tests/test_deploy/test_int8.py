"""Int8 files: which layers cost what, which stay float32, and what is refused."""

import copy
import itertools
import re

import numpy as np
import pytest
import torch

pytest.importorskip('mmseg')
pytest.importorskip('onnxruntime')
import onnx
from mmengine.config import Config
from onnx.numpy_helper import to_array

import mmexpand.deploy.int8
from mmexpand.deploy import (
    ExportError,
    Int8,
    calibration_images,
    export_onnx,
    onnxruntime_run,
)
from mmexpand.deploy.int8 import by_head, smallest
from mmexpand.deploy.scoring import main_metric, points_lost
from mmexpand.mm.datasets import evenly_spaced
from mmexpand.mm.models import build_compact_model
from tests.conftest import SEGMENTOR, small_config
from tests.test_deploy.networks import images, randomise
from tests.tools_in_process import run

SPOILED = 'backbone.encoder.1.1.convs.1.conv'
HEAD = 'decode_head.conv_seg'
GIVEN = [images(1, 32, 48, seed=seed) for seed in range(1, 5)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    cfg = Config(dict(default_scope='mmseg', model=copy.deepcopy(SEGMENTOR)))
    cfg.model.auxiliary_head = dict(cfg.model.decode_head, in_index=0, in_channels=8)
    return randomise(build_compact_model(cfg))


@pytest.fixture
def spoiled(model):
    """As a dead channel of a RepVGG block does: its identity branch divides by nearly nothing."""
    before, after = model.backbone.encoder[1][1].convs
    with torch.no_grad():
        before.norm.weight[1], before.norm.bias[1] = 1e-6, -1  # dead behind the ReLU
        after.conv.weight[:3, 1, 1, 1] = 100
    return model


def export(model, tmp_path, **options):
    path = tmp_path / 'int8.onnx'
    report = export_onnx(model, images(1, 32, 48), path, raw=True, int8=Int8(GIVEN, **options))
    return report, onnx.load(path).graph


def weights_in_int8(graph):
    """By the layer's scope: the int8 weights of convolutions."""
    initial = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    by_output = {node.output[0]: node for node in graph.node}
    found = {}
    for node in graph.node:
        if node.op_type == 'Conv' and node.input[1] in by_output:
            weight = initial[by_output[node.input[1]].input[0]]
            assert weight.dtype == np.int8
            found[node.name] = weight
    return found


def test_the_worst_layer_is_named_with_its_reason_and_can_be_kept(spoiled, tmp_path):
    report, graph = export(spoiled, tmp_path)
    worst, second = report.int8.layers[:2]
    assert worst.name == SPOILED
    assert worst.error > 2 * second.error
    assert re.match(r'channel \d has a weight of [\d.]+, the median', worst.reason)
    assert len(report.int8.layers) == len(weights_in_int8(graph)) == 8
    assert report.int8.kept == ()
    kept, graph = export(spoiled, tmp_path, keep=[SPOILED])
    assert kept.int8.kept == (SPOILED,)
    assert kept.int8.error < 0.7 * report.int8.error
    assert kept.max_error < report.max_error
    assert len(weights_in_int8(graph)) == 7
    assert not any('encoder.1.1/convs/convs.1' in name for name in weights_in_int8(graph))


def test_a_norm_that_scales_one_channel_is_the_reason(model, tmp_path):
    norm = model.backbone.encoder[1][1].convs[0].norm
    with torch.no_grad():
        norm.running_var[3] = 1e-8
        norm.eps = 1e-12
    report, _ = export(model, tmp_path)
    (layer,) = (e for e in report.int8.layers if e.name == 'backbone.encoder.1.1.convs.0.conv')
    assert re.search(r'its norm scales channel 3 by \d.*, the median by ', layer.reason)


@pytest.mark.parametrize(('target', 'bits'), [('x86', 7), ('x86-vnni', 8), ('arm', 8)])
def test_weights_have_the_bits_that_the_target_can_add_up(model, tmp_path, target, bits):
    _, graph = export(model, tmp_path, target=target)
    largest = max(np.abs(weight.astype(int)).max() for weight in weights_in_int8(graph).values())
    assert largest == (64 if bits == 7 else 127)


@pytest.mark.parametrize('method', ['percentile', 'entropy'])
def test_the_method_changes_the_ranges(model, tmp_path, method):
    def scales(graph):
        return [to_array(t) for t in graph.initializer if t.name.endswith('_scale')]

    usual, other = (
        scales(export(model, tmp_path)[1]),
        scales(export(model, tmp_path, method=method)[1]),
    )
    assert len(usual) == len(other) > 10
    assert any(not np.array_equal(a, b) for a, b in zip(usual, other, strict=True))


def test_scales_by_channel_or_by_kernel_are_chosen_by_the_error(model, tmp_path, monkeypatch):
    assert export(model, tmp_path)[0].int8.per_channel

    class Swapped(mmexpand.deploy.int8.Quantiser):
        def quantised(self, nodes, per_channel):
            return super().quantised(nodes, not per_channel)

    monkeypatch.setattr(mmexpand.deploy.int8, 'Quantiser', Swapped)
    assert not export(model, tmp_path)[0].int8.per_channel


def test_auto_keeps_heads_first_then_the_worst(spoiled, tmp_path):
    answers, sizes = iter([False, False, True]), []

    def accepts(path):
        sizes.append(len(weights_in_int8(onnx.load(path).graph)))
        return next(answers)

    report, _ = export(spoiled, tmp_path, accepts=accepts)
    assert report.int8.kept == (HEAD, SPOILED)
    assert sizes == [8, 7, 6]


def test_auto_keeps_no_more_layers_than_it_must(model, tmp_path):
    sizes = []

    def accepts(path):
        sizes.append(len(weights_in_int8(onnx.load(path).graph)))
        return sizes[-1] <= 3

    report, graph = export(model, tmp_path, accepts=accepts)
    assert len(report.int8.kept) == 5
    assert len(weights_in_int8(graph)) == 3
    assert sizes == [8, 7, 6, 4, 1, 3]


@pytest.mark.parametrize('first', range(1, 12))
def test_the_smallest_number_is_found_by_few_questions(first):
    asked = []
    answers = [n >= first for n in range(11)]

    def accepted(number):
        asked.append(number)
        return answers[number]

    assert smallest(accepted, 10) == (first if first <= 10 else None)
    assert len(asked) == len(set(asked)) <= 8
    assert smallest(accepted, 0) is None


def test_wrong_kernels_of_the_runtime_are_noticed(model, tmp_path, monkeypatch):
    def run(path, optimise=True, **options):
        found = onnxruntime_run(path, optimise=optimise, **options)
        graph = onnx.load(path).graph
        wrong = optimise and any(node.op_type == 'QuantizeLinear' for node in graph.node)
        return lambda batch: [value + wrong * 4 * (value > 0.5) for value in found(batch)]

    monkeypatch.setattr(mmexpand.deploy.int8, 'onnxruntime_run', run)
    with pytest.raises(ExportError, match=r'int8 kernels of ONNX Runtime \S+ are wrong on this'):
        export(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_never_good_enough_is_not_written(model, tmp_path):
    with pytest.raises(ExportError, match=r'no int8 file is good enough.*float32 file'):
        export(model, tmp_path, accepts=lambda path: False)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_layer_is_refused(model, tmp_path):
    with pytest.raises(ExportError, match=r"^'backbone\.decoder\.7' matches no .*near matches"):
        export(model, tmp_path, keep=['backbone.decoder.7'])
    # It is there, and does not run.
    with pytest.raises(ExportError, match=r"^'auxiliary_head' matches no .*in int8"):
        export(model, tmp_path, keep=['auxiliary_head'])
    with pytest.raises(ValueError, match=r"one of 'x86', 'x86-vnni', 'arm', got 'avx'"):
        Int8(GIVEN, target='avx')
    with pytest.raises(ValueError, match='requires calibration images'):
        Int8([])
    assert list(tmp_path.iterdir()) == []


def test_a_file_near_chance_is_refused(model, tmp_path):
    with torch.no_grad():
        model.backbone.encoder[0][0].convs[0].conv.weight[:, 0] = 1e5  # of a channel that is black
    black = [image * torch.tensor([0, 1, 1]).view(1, 3, 1, 1) for image in GIVEN]
    path = tmp_path / 'int8.onnx'
    said = r'near chance: .* was not written.*backbone\.encoder\.0\.0\.convs\.0\.conv .*--int8-keep'
    with pytest.raises(ExportError, match=said):
        export_onnx(model, black[0], path, raw=True, int8=Int8(black))
    assert list(tmp_path.iterdir()) == []
    keep = ['backbone.encoder.0.0.convs.0.conv']
    export_onnx(model, black[0], path, raw=True, int8=Int8(black, keep=keep))
    assert path.exists()


def test_a_short_or_empty_calibration_split_is_refused(model, street, tmp_path):
    cfg = small_config(street, tmp_path)
    assert len(calibration_images(model, cfg, 4, (32, 48))) == 4
    dataset = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[dataset, dataset])
    found = calibration_images(model, cfg, 3, (32, 48))
    every = calibration_images(model, cfg, 8, (32, 48))
    assert all(torch.equal(found[i], every[j]) for i, j in enumerate((0, 4, 7)))
    cfg.train_dataloader.dataset = dataset
    with pytest.raises(
        ExportError, match=r'^int8 requires 5 .* CityscapesDataset .* has 4; use --int8 4'
    ):
        calibration_images(model, cfg, 5, (32, 48))
    (tmp_path / 'empty').mkdir()
    cfg.train_dataloader.dataset.data_root = str(tmp_path)
    cfg.train_dataloader.dataset.data_prefix = dict(img_path='empty', seg_map_path='empty')
    with pytest.raises(ExportError, match=r'has 0; use a data set with images'):
        calibration_images(model, cfg, 1, (32, 48))


def test_levels_of_a_head_are_taken_together():
    """A level without objects hardly depends on the image."""
    rng = np.random.default_rng(0)
    large, small = rng.normal(size=(4, 1, 3, 20, 20)), 1e-3 * rng.normal(size=(4, 1, 3, 5, 5))
    boxes = rng.normal(size=(4, 1, 4, 5, 5))
    found = by_head([large, small, boxes], [0, 0, 0])
    joined = np.concatenate([large.ravel(), small.ravel()])
    assert found == pytest.approx([np.sqrt((joined**2).mean()), np.sqrt((boxes**2).mean())])


@pytest.mark.parametrize(('length', 'count'), [(10, 6), (100, 64), (3, 4), (1, 1)])
def test_images_are_evenly_spaced(length, count):
    found = evenly_spaced(length, count)
    steps = {b - a for a, b in itertools.pairwise(found)}
    assert len(found) == min(length, count) and max(steps, default=1) - min(steps, default=1) <= 1
    assert found[0] == 0 and found[-1] == length - 1


def test_images_of_another_size_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r'calibration images of shape \(3, 16, 16\) do not fit'):
        export_onnx(model, images(1, 32, 48), tmp_path / 'a.onnx', int8=Int8([images(1, 16, 16)]))
    two = Int8([images(1, 32, 48), images(1, 48, 32)])
    with pytest.raises(ValueError, match=r'shapes \(3, 32, 48\) and \(3, 48, 32\)'):
        export_onnx(model, images(1, 32, 48), tmp_path / 'a.onnx', dynamic_size=True, int8=two)


def test_an_activation_behind_a_layer_is_part_of_its_range(model, tmp_path):
    """A layer's outputs below zero cost no step, as no other node reads them."""
    _, graph = export(model, tmp_path)
    producers = {name: node for node in graph.node for name in node.output}
    inputs = [
        producers[n.input[0]]
        for n in graph.node
        if n.op_type == 'QuantizeLinear' and n.input[0] in producers
    ]
    assert [node.op_type for node in inputs].count('Conv') > 4
    left = [node for node in graph.node if node.op_type == 'Relu']
    assert not any(producers[node.input[0]].op_type == 'DequantizeLinear' for node in left)


def test_points_of_shares_and_of_per_cent():
    assert points_lost('mAP', {'mAP': 0.3}, {'mAP': 0.28}) == pytest.approx(2)
    assert points_lost('mIoU', {'mIoU': 37.0}, {'mIoU': 36.5}) == 0.5
    assert points_lost('mAP', {'mAP': 0.3}, {}) == pytest.approx(30)
    metrics = {'aAcc': 80.0, 'mIoU': 30.0}
    assert main_metric({}, metrics) == 'mIoU'
    cfg = dict(default_hooks=dict(checkpoint=dict(save_best=['auto', 'aAcc'])))
    assert main_metric(cfg, metrics) == 'aAcc'
    with pytest.raises(ExportError, match='no metric'):
        main_metric({}, {'names': 'a'})


def test_options_without_int8_are_refused(capsys):
    base = ['c.py', 'x.pth', '--out', 'x.onnx', '--image', 'x.png']
    for options, words in (
        (['--int8-keep', 'auto'], 'add --int8 N'),
        (['--int8-target', 'arm'], 'add --int8 N'),
        (['--int8', '2', '--int8-drop', '-1'], 'must be at least 0'),
        (['--int8', '2', '--int8-keep', 'auto', '--raw'], 'leave out --raw'),
        (['--raw', '--logits'], 'use one of them'),
    ):
        assert run('export_onnx.py', *base, *options)[0] == 2
        assert words in capsys.readouterr().err
