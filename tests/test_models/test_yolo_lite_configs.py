from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet')
import cv2
from mmdet.registry import DATASETS, METRICS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import Runner

from mmexpand import ExpandConfig
from mmexpand.mm.hooks import expand_built

CONFIGS = Path(__file__).parents[2] / 'configs' / 'yolo_lite'
COMPACT = CONFIGS / 'yolo-lite_1xb64-600k_voc0712-224x224.py'
EXPANDED = CONFIGS / 'yolo-lite_expand-cl-r4_1xb64-600k_voc0712-224x224.py'
BCCD = CONFIGS / 'yolo-lite_1xb8-2000iters_bccd-160x160.py'
CLASSES = ('RBC', 'WBC', 'Platelets')


@pytest.fixture(autouse=True)
def mmdet_scope():
    register_all_modules()


def write_voc(root, boxes_of_image, classes):
    """A data set in VOC's layout with 120 x 80 photographs and the given boxes."""
    for folder in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (root / 'VOC2007' / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, boxes in boxes_of_image.items():
        image = rng.integers(0, 256, (80, 120, 3), np.uint8)
        cv2.imwrite(str(root / f'VOC2007/JPEGImages/{name}.jpg'), image)
        objects = ''.join(
            f'<object><name>{classes[k % len(classes)]}</name><difficult>{int(k == 1)}</difficult>'
            f'<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>'
            '</bndbox></object>'
            for k, (x1, y1, x2, y2) in enumerate(boxes)
        )
        (root / f'VOC2007/Annotations/{name}.xml').write_text(
            '<annotation><size><width>120</width><height>80</height><depth>3</depth></size>'
            f'{objects}</annotation>'
        )
    for split in ('trainval', 'test'):
        (root / f'VOC2007/ImageSets/Main/{split}.txt').write_text('\n'.join(boxes_of_image))


@pytest.fixture
def voc(tmp_path):
    boxes = {
        'good': [(10, 10, 60, 50), (30, 20, 90, 70), (80, 5, 119, 79)],
        'zero_area': [(10, 10, 10, 50), (30, 20, 90, 20), (20, 20, 50, 60)],
        'only_zero_area': [(1, 1, 1, 1)],
        'outside': [(-5, -5, 130, 90)],
        'empty': [],
    }
    write_voc(tmp_path / 'voc', boxes, CLASSES)
    return tmp_path / 'voc'


def options_for(root, classes):
    """The command-line options that point a config at another data set in VOC's layout."""
    return {
        'model.bbox_head.num_classes': len(classes),
        'train_dataloader.dataset.datasets.0.data_root': str(root),
        'train_dataloader.dataset.datasets.0.metainfo.classes': classes,
        'train_dataloader.dataset.datasets.1.data_root': str(root),
        'train_dataloader.dataset.datasets.1.metainfo.classes': classes,
        'train_dataloader.dataset.datasets.1.ann_file': 'VOC2007/ImageSets/Main/trainval.txt',
        'train_dataloader.dataset.datasets.1.data_prefix.sub_data_root': 'VOC2007/',
        'val_dataloader.dataset.data_root': str(root),
        'val_dataloader.dataset.metainfo.classes': classes,
        'test_dataloader.dataset.data_root': str(root),
        'test_dataloader.dataset.metainfo.classes': classes,
    }


def test_model_is_stock_mmdet_with_our_two_parts():
    cfg = Config.fromfile(COMPACT)
    model = MODELS.build(cfg.model)
    assert type(model).__module__ == 'mmdet.models.detectors.single_stage'
    assert sum(p.numel() for p in model.parameters()) == 572_317
    assert cfg.custom_imports.imports == ['mmexpand']


def test_twin_differs_in_hooks_only():
    compact, expanded = (Config.fromfile(path).to_dict() for path in (COMPACT, EXPANDED))
    hooks = expanded.pop('custom_hooks')
    assert hooks[: len(compact['custom_hooks'])] == compact.pop('custom_hooks')
    assert hooks[-2:] == [
        dict(type='ExpandHook', include='backbone', method='cl', rate=4, init='preserve'),
        dict(type='ContractHook'),
    ]
    assert expanded == compact


def test_twin_starts_as_the_compact_network():
    cfg = Config.fromfile(EXPANDED)
    models = [MODELS.build(cfg.model), MODELS.build(cfg.model)]
    settings = {k: v for k, v in cfg.custom_hooks[1].items() if k != 'type'}
    images = torch.rand(2, 3, 64, 64)
    outputs = []
    for model, expanded in zip(models, (False, True), strict=True):
        torch.manual_seed(0)
        if expanded:
            assert len(expand_built(model, ExpandConfig(**settings))) == 5
        model.init_weights()
        outputs.append(model(images, mode='tensor')[0])
    # Five folded layers in float32.
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
    assert outputs[0].abs().max() > 0.1


def test_evaluation_protocol():
    cfg = Config.fromfile(COMPACT)
    assert cfg.test_evaluator.eval_mode == '11points'
    assert cfg.test_dataloader.dataset.ann_file == 'VOC2007/ImageSets/Main/test.txt'
    train_sets = [d.ann_file for d in cfg.train_dataloader.dataset.datasets]
    assert train_sets == [f'VOC{year}/ImageSets/Main/trainval.txt' for year in (2007, 2012)]


def test_learning_rate_is_darknets():
    cfg = Config.fromfile(COMPACT)
    optim_wrapper = build_optim_wrapper(torch.nn.Conv2d(1, 1, 1), cfg.optim_wrapper)
    decay = {
        tuple(g['params'][0].shape): g['weight_decay'] for g in optim_wrapper.optimizer.param_groups
    }
    assert decay == {(1, 1, 1, 1): 0.0005, (1,): 0.0}
    scheduler_cfgs = [dict(c) for c in cfg.param_scheduler]
    # The real milestones, divided by 200 so that the test is quick.
    scheduler_cfgs[-1]['milestones'] = [m // 200 for m in scheduler_cfgs[-1]['milestones']]
    schedulers = [
        PARAM_SCHEDULERS.build(c, default_args=dict(optimizer=optim_wrapper))
        for c in scheduler_cfgs
    ]
    rates = []
    for _ in range(2300):
        rates.append(optim_wrapper.param_groups[0]['lr'])
        optim_wrapper.step()
        for scheduler in schedulers:
            scheduler.step()
    burn_in = [0.001 * (n / 1000) ** 4 for n in range(1, 1001)]
    np.testing.assert_allclose(rates[:1000], burn_in, rtol=1e-9)
    np.testing.assert_allclose(rates[1000:2000], 0.001, rtol=1e-9)
    np.testing.assert_allclose(rates[2000:2250], 0.0001, rtol=1e-9)
    np.testing.assert_allclose(rates[2250:], 0.00001, rtol=1e-9)


def test_multi_scale_sizes():
    cfg = Config.fromfile(COMPACT)
    resize = MODELS.build(cfg.model.data_preprocessor.batch_augments[0])
    sizes = {resize._get_random_size(1.0, torch.device('cpu')) for _ in range(300)}
    assert sizes == {(s, s) for s in range(160, 321, 32)}


def test_real_annotations_pass_the_augmentation(voc):
    cfg = Config.fromfile(COMPACT)
    cfg.merge_from_dict(options_for(voc, CLASSES))
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(dataset) == 2 * 5
    names = [Path(dataset.get_data_info(k)['img_path']).stem for k in range(5)]
    seen_boxes = set()
    for _ in range(20):
        for name, item in zip(names, (dataset[k] for k in range(5)), strict=True):
            assert item['inputs'].shape == (3, 224, 224)
            gt = item['data_samples'].gt_instances
            ignored = item['data_samples'].ignored_instances
            boxes = gt.bboxes.tensor
            assert boxes.shape == (len(gt.labels), 4)
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert ((boxes >= 0) & (boxes <= 224)).all()
            if name == 'good':
                assert set(gt.labels.tolist()) <= {0, 2}
                assert set(ignored.labels.tolist()) <= {1}
                seen_boxes.update(map(tuple, boxes.tolist()))
            if name == 'zero_area':
                assert set(gt.labels.tolist()) <= {2}
            if name in ('only_zero_area', 'empty'):
                assert len(gt) == len(ignored) == 0
    assert len(seen_boxes) > 20


def test_augmentation_moves_boxes_with_the_image(tmp_path):
    """A white rectangle and its box stay together, within the blur of the resize."""
    write_voc(tmp_path, {'one': [(31, 21, 90, 60)]}, CLASSES)
    image = np.zeros((80, 120, 3), np.uint8)
    image[20:60, 30:90] = 255
    cv2.imwrite(str(tmp_path / 'VOC2007/JPEGImages/one.jpg'), image)
    cfg = Config.fromfile(COMPACT)
    cfg.merge_from_dict(options_for(tmp_path, CLASSES))
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    widths = set()
    for _ in range(20):
        item = dataset[0]
        rows, columns = np.nonzero(item['inputs'].numpy().max(0) > 80)
        (box,) = item['data_samples'].gt_instances.bboxes.tensor.tolist()
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        # VOC's far edges belong to the box: it ends at 89 and 59 where the pixels end at 90 and 60.
        np.testing.assert_allclose(found, box, atol=7)
        widths.add(round(box[2] - box[0]))
    assert len(widths) > 5


def test_short_run_on_another_data_set_with_options_alone(voc, tmp_path):
    cfg = Config.fromfile(COMPACT)
    cfg.merge_from_dict(
        {
            **options_for(voc, CLASSES),
            'train_dataloader.batch_size': 4,
            'train_dataloader.num_workers': 0,
            'train_dataloader.persistent_workers': False,
            'val_dataloader.num_workers': 0,
            'val_dataloader.persistent_workers': False,
            'train_cfg.max_iters': 12,
            'train_cfg.val_interval': 12,
            'default_hooks.checkpoint.interval': 12,
            'work_dir': str(tmp_path / 'work'),
        }
    )
    runner = Runner.from_cfg(cfg)
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    runner.train()
    assert runner.iter == 12
    after = runner.model.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in after)
    assert list((tmp_path / 'work').glob('iter_12.pth'))
    assert list((tmp_path / 'work').glob('best_pascal_voc_mAP*.pth'))


def test_wrong_number_of_classes_is_one_clear_error(voc, tmp_path):
    cfg = Config.fromfile(COMPACT)
    options = options_for(voc, CLASSES)
    del options['model.bbox_head.num_classes']
    cfg.merge_from_dict(
        {
            **options,
            'train_dataloader.num_workers': 0,
            'train_dataloader.persistent_workers': False,
            'work_dir': str(tmp_path / 'work'),
        }
    )
    with pytest.raises(AssertionError, match=r'num_classes.*\(20\).*3\)'):
        Runner.from_cfg(cfg).train()


def test_the_table_of_another_data_set_has_its_own_class_names(voc, monkeypatch):
    """In a folder that is called VOC2007, too."""
    said = []
    said_by = 'mmdet.evaluation.functional.mean_ap.print_log'
    monkeypatch.setattr(said_by, lambda text, **_: said.append(text))
    cfg = Config.fromfile(BCCD)
    dataset = dict(cfg.test_dataloader.dataset, data_root=f'{voc}/')
    metric = METRICS.build(cfg.test_evaluator)
    metric.dataset_meta = DATASETS.build(dataset).metainfo
    found, nothing = np.array([[10, 10, 60, 50, 0.9]]), np.zeros((0, 5))
    truth = dict(bboxes=found[:, :4], labels=np.array([0]))
    truth.update(bboxes_ignore=np.zeros((0, 4)), labels_ignore=np.zeros(0))
    metric.compute_metrics([(truth, [found, nothing, nothing])])
    assert all(name in said[-1] for name in CLASSES)
    assert 'aeroplane' not in said[-1]
