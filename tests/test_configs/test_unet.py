import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmseg')
pytest.importorskip('mmdet')
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.apis import inference_model, init_model
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

import mmexpand
from mmexpand.mm.runtime import prepare_cpu
from tests.conftest import ONEDL

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools/demo'))
from draw_cityscapes import draw_cityscapes

ROOT = Path(__file__).parents[2]
UNET = ROOT / 'configs/unet'
MMSEG = UNET / 'unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py'
PAPER = UNET / 'unet-s5-d16_fcn-ce-sum_4xb4-160k_cityscapes-512x1024.py'
DEMO = ROOT / 'configs/demo/unet-s4-d8_fcn_2xb4-200iters_drawn-cityscapes-96x192.py'
COMPACT = [MMSEG, PAPER, DEMO]
HOOKS = [
    dict(type='ExpandHook', include='backbone.encoder', method='cl', rate=4),
    dict(type='ContractHook'),
]


def expanded(path):
    return path.with_name(path.name.replace('_fcn', '_expand-cl-r4_fcn', 1))


def small(path):
    """A config with a network that is quick to build and run."""
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(
        {
            'model.backbone.base_channels': 2,
            'model.decode_head.in_channels': 2,
            'model.decode_head.channels': 2,
        }
    )
    if cfg.model.auxiliary_head is not None:
        cfg.merge_from_dict(
            {'model.auxiliary_head.in_channels': 4, 'model.auxiliary_head.channels': 2}
        )
    prepare_cpu(cfg)
    init_default_scope('mmseg')
    return cfg


@pytest.fixture(scope='module')
def cityscapes(tmp_path_factory):
    out = tmp_path_factory.mktemp('drawn') / 'cityscapes'
    draw_cityscapes(out, num_train=4, num_val=2, size=(100, 70))
    return out


@pytest.mark.parametrize('path', COMPACT, ids=lambda p: p.stem)
def test_twin_differs_in_our_hooks_only(path):
    compact, twin = (Config.fromfile(p).to_dict() for p in (path, expanded(path)))
    assert twin.pop('custom_imports') == dict(imports=['mmexpand'], allow_failed_imports=False)
    expand, contract = twin.pop('custom_hooks')
    # The demo's table shows what the expanded network scores too, and it leaves a report.
    for option in ('evaluate_expanded', 'report'):
        assert contract.pop(option, False) == ('drawn' in path.stem)
    assert [expand, contract] == HOOKS
    assert twin == compact


def test_first_recipe_is_mmsegs_own():
    ours = Config.fromfile(MMSEG).to_dict()
    theirs = Config.fromfile(
        str(Path(sys.modules['mmseg'].__file__).parent / '.mim/configs/unet' / MMSEG.name)
    ).to_dict()
    ours['model']['data_preprocessor'].pop('test_cfg')
    ours['data_preprocessor'].pop('test_cfg')
    for key in ('val_evaluator', 'test_evaluator'):
        assert ours.pop(key)['iou_metrics'] == ['mIoU', 'mFscore']
        assert theirs.pop(key)['iou_metrics'] == ['mIoU']
    for key in ('save_best', 'max_keep_ckpts'):
        ours['default_hooks']['checkpoint'].pop(key)

    def unscoped(node):
        if isinstance(node, dict):
            return {k: unscoped(v) for k, v in node.items() if k != '_scope_'}
        return [unscoped(v) for v in node] if isinstance(node, (list, tuple)) else node

    assert unscoped(ours) == unscoped(theirs)


def test_contracting_path_is_expanded():
    model = MODELS.build(small(MMSEG).model)
    plan = mmexpand.plan(
        model, mmexpand.ExpandConfig(method='cl', include='backbone.encoder', rate=4)
    )
    convs = [
        name
        for name, module in model.backbone.encoder.named_modules(prefix='backbone.encoder')
        if isinstance(module, torch.nn.Conv2d)
    ]
    assert [layer.name for layer in plan] == convs
    assert len(convs) == 10


def test_paper_loss_is_summed_over_pixels():
    cfg = small(PAPER)
    assert cfg.model.auxiliary_head is None
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).double()
    model.decode_head.dropout = None
    labels = torch.randint(0, 19, (2, 1, 32, 48))
    labels[:, :, :9] = 255
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    model.train()
    losses = model.loss(images, samples)
    assert [key for key in losses if 'loss' in key] == ['decode.loss_ce']
    log_probabilities = model(images, mode='tensor').log_softmax(1)
    expected = -sum(
        log_probabilities[n, labels[n, 0, y, x], y, x]
        for n in range(2)
        for y in range(9, 32)
        for x in range(48)
    )
    torch.testing.assert_close(losses['decode.loss_ce'], expected, rtol=1e-12, atol=0)


def test_paper_optimizer():
    cfg = Config.fromfile(PAPER)
    optimizer = build_optim_wrapper(torch.nn.Conv2d(1, 1, 1), cfg.optim_wrapper).optimizer
    assert type(optimizer) is torch.optim.SGD
    assert {k: optimizer.defaults[k] for k in ('lr', 'momentum', 'weight_decay')} == dict(
        lr=1e-8, momentum=0.9, weight_decay=0
    )
    assert cfg.param_scheduler == []


@pytest.mark.parametrize('path', COMPACT, ids=lambda p: p.stem)
def test_images_of_any_size(path):
    cfg = small(path)
    size = cfg.test_dataloader.dataset.pipeline[1].get('scale')
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    if size is not None:
        cfg.test_pipeline[1].scale = (103, 77)
    model = init_model(cfg, device='cpu')
    model.dataset_meta = {}
    result = inference_model(model, np.zeros((77, 103, 3), np.uint8))
    assert result.pred_sem_seg.shape == (77, 103)
    assert result.pad_shape[0] % 16 == result.pad_shape[1] % 16 == 0


@pytest.mark.skipif(ONEDL, reason='its mmengine finds no mmseg::... without ours')
@pytest.mark.parametrize('path', [MMSEG, PAPER], ids=lambda p: p.stem)
def test_compact_config_needs_nothing_of_ours(path):
    code = (
        'import sys; sys.modules["mmexpand"] = None\n'
        'from mmengine.config import Config\n'
        'from mmengine.registry import init_default_scope\n'
        'from mmseg.registry import MODELS\n'
        f'cfg = Config.fromfile({str(path)!r})\n'
        'init_default_scope("mmseg")\n'
        'print(type(MODELS.build(cfg.model)).__module__)\n'
    )
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd='/'
    )
    assert result.stdout.strip() == 'mmseg.models.segmentors.encoder_decoder', result.stderr


def test_albumentations_changes_colours_alone(cityscapes):
    cfg = small(PAPER)
    steps = cfg.train_dataloader.dataset.pipeline
    (albu,) = [step for step in steps if step['type'] == 'Albu']
    plain = Compose([dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')])
    (image,) = (cityscapes / 'leftImg8bit/val').glob('*/*_000000_*.png')
    label = (
        str(image)
        .replace('leftImg8bit/', 'gtFine/')
        .replace('leftImg8bit.png', 'gtFine_labelTrainIds.png')
    )
    info = dict(img_path=str(image), seg_map_path=label, reduce_zero_label=False, seg_fields=[])
    before = plain(info)
    augment = Compose([albu])
    changed = 0
    for _ in range(20):
        after = augment({k: v.copy() if hasattr(v, 'copy') else v for k, v in before.items()})
        assert after.keys() == before.keys()
        np.testing.assert_array_equal(after['gt_seg_map'], before['gt_seg_map'])
        assert after['img'].shape == before['img'].shape
        changed += not np.array_equal(after['img'], before['img'])
    assert 2 <= changed <= 18


@pytest.mark.parametrize('path', [MMSEG, PAPER, expanded(PAPER)], ids=lambda p: p.stem)
def test_short_run_on_another_data_set_with_options_alone(path, cityscapes, tmp_path):
    cfg = small(path)
    # A crop and a batch for a CPU: what the README names.
    cfg.merge_from_dict(
        {
            'model.data_preprocessor.size': (48, 64),
            'train_dataloader.dataset.data_root': str(cityscapes),
            'train_dataloader.dataset.pipeline.2.scale': (100, 70),
            'train_dataloader.dataset.pipeline.3.crop_size': (48, 64),
            'train_dataloader.batch_size': 2,
            'train_dataloader.num_workers': 0,
            'train_dataloader.persistent_workers': False,
            'train_cfg.max_iters': 2,
            'train_cfg.val_interval': 2,
            'work_dir': str(tmp_path),
            'experiment_name': f'{path.stem}_short',
        }
    )
    for split in ('val', 'test'):
        cfg.merge_from_dict(
            {
                f'{split}_dataloader.dataset.data_root': str(cityscapes),
                f'{split}_dataloader.dataset.pipeline.1.scale': (100, 70),
                f'{split}_dataloader.num_workers': 0,
                f'{split}_dataloader.persistent_workers': False,
            }
        )
    runner = Runner.from_cfg(cfg)
    head = runner.model.decode_head
    before = {key: value.clone() for key, value in head.state_dict().items()}
    runner.train()
    assert any(not torch.equal(before[key], value) for key, value in head.state_dict().items())
    metrics = runner.val_loop.run()
    assert {'mIoU', 'mRecall', 'mPrecision'} <= metrics.keys()
    assert (tmp_path / 'best_mIoU_iter_2.pth').exists()
    assert (tmp_path / 'compact_best.pth').exists() == ('expand' in path.stem)


def test_demo_of_yolo_lite():
    """Here, since it belongs to the demo: the detector's twin, and where the demo's data lies."""
    (compact,) = (ROOT / 'configs/demo').glob('yolo-lite_2xb*.py')
    twin = compact.with_name(compact.name.replace('yolo-lite', 'yolo-lite_expand-cl-r4', 1))
    real = Config.fromfile(
        ROOT / 'configs/yolo_lite/yolo-lite_expand-cl-r4_1xb64-600k_voc0712-224x224.py'
    )
    compact, twin = (Config.fromfile(path).to_dict() for path in (compact, twin))
    hooks = twin.pop('custom_hooks')
    assert hooks[-1].pop('evaluate_expanded')
    assert hooks[-1].pop('report')
    assert hooks == real.to_dict()['custom_hooks']
    assert compact.pop('custom_hooks') == real.to_dict()['custom_hooks'][:1]
    assert twin == compact


@pytest.mark.parametrize('path', sorted((ROOT / 'configs/demo').glob('*.py')), ids=lambda p: p.stem)
def test_demo_reads_the_demos_folder(path):
    cfg = Config.fromfile(path)
    splits = ('train', 'val', 'test')
    roots = {cfg[f'{split}_dataloader'].dataset.data_root for split in splits}
    assert len(roots) == 1
    assert roots.pop().startswith('demo_output/data/')
