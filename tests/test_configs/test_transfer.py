"""The configs of knowledge transfer: a teacher is trained, and each student trains with it."""

import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip('mmseg')
pytest.importorskip('mmdet')
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mmexpand.mm.compact_config import make_compact_config
from mmexpand.mm.models import build_compact_model, configured_expansions
from mmexpand.mm.runtime import prepare_cpu
from mmexpand.models import ResNet18
from mmexpand.surgery.checkpoint import META_KEY, load_checkpoint
from tests.conftest import draw_street
from tests.test_models.test_yolo_lite_configs import CLASSES, write_voc
from tests.tools_in_process import run

CONFIGS = Path(__file__).parents[2] / 'configs'
SMALLNET, UNET, YOLO = (CONFIGS / name for name in ('smallnet', 'unet', 'yolo_lite'))
FASTSCNN = UNET.parent / 'fastscnn'
STUDENTS = {
    SMALLNET / 'smallnet-k7_kd_1xb128-150e_cifar10.py': ['loss_kd'],
    SMALLNET / 'smallnet-k7_expand-ck-fc-r4_kd_1xb128-150e_cifar10.py': ['loss_kd'],
    SMALLNET / 'smallnet-k7_expand-ck-fc-r4_hint_1xb128-150e_cifar10.py': ['loss_hint'],
    SMALLNET / 'smallnet-k7_expand-ck-fc-r4_pkt_1xb128-150e_cifar10.py': ['loss_pkt'],
    UNET / 'unet-s4-d8_expand-repvgg_kd_fcn_1xb8-1500iters_camvid-96x128.py': ['loss_kd'],
    YOLO / 'yolo-lite_expand-bn_kd-hint_1xb8-2000iters_bccd-160x160.py': [
        'loss_kd',
        'loss_hint',
    ],
}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A data set of a few images for each of the three folders."""
    root = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(root / 'cifar10.zip', 'w') as archive:
        for split in ('train', 'test'):
            for label in range(10):
                for index in range(3):
                    image = rng.integers(20 * label, 20 * label + 50, (32, 32, 3), dtype=np.uint8)
                    content = cv2.imencode('.png', image)[1].tobytes()
                    archive.writestr(f'{split}/{label}/{index}.png', content)
    draw_street(root / 'street')
    for folder in ('leftImg8bit', 'gtFine'):
        shutil.copytree(root / 'street' / folder / 'train', root / 'street' / folder / 'val')
    write_voc(
        root / 'voc', {str(i): [(10, 10, 60, 50), (30, 20, 90, 70)] for i in range(4)}, CLASSES
    )
    for split in ('train', 'val'):
        shutil.copy(
            root / 'voc/VOC2007/ImageSets/Main/test.txt',
            root / f'voc/VOC2007/ImageSets/Main/{split}.txt',
        )
    return root


def options(path, data) -> dict:
    """A short run on the drawn data: two steps."""
    folders = {SMALLNET: data, UNET: data / 'street', FASTSCNN: data / 'street'}
    folder = folders.get(path.parent, data / 'voc')
    found = {'train_dataloader.batch_size': 2, 'val_dataloader.batch_size': 2}
    for split in ('train', 'val'):
        found[f'{split}_dataloader.dataset.data_root'] = str(folder)
    if path.parent == SMALLNET:
        found |= {f'{split}_dataloader.dataset.val_images': 1 for split in ('train', 'val')}
        # So few steps are not to leave the teacher with statistics that no image has.
        found |= {'optim_wrapper.optimizer.lr': 0.001, 'train_dataloader.batch_size': 10}
        return found | {'train_cfg.max_epochs': 1, 'default_hooks.logger.interval': 1}
    return found | {'train_cfg.max_iters': 2, 'default_hooks.logger.interval': 1}


def load(path, data, work_dir) -> Config:
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(options(path, data))
    cfg.work_dir = str(work_dir)
    # mmengine keeps a message hub by this name.
    cfg.experiment_name = str(work_dir)
    prepare_cpu(cfg)
    return cfg


def train(cfg) -> Runner:
    runner = Runner.from_cfg(cfg)
    runner.train()
    DefaultScope._instance_dict.clear()
    return runner


@pytest.fixture(scope='module')
def teachers(data, tmp_path_factory):
    """By config, the checkpoint of a teacher that has trained for two steps."""
    root = tmp_path_factory.mktemp('teachers')
    found = {}
    for path in {Path(distill(Config.fromfile(path)).teacher_config) for path in STUDENTS}:
        train(load(path, data, root / path.stem))
        (found[path],) = (root / path.stem).glob('*.pth')
    return found


def distill(cfg):
    (hook,) = [hook for hook in cfg.custom_hooks if hook.type == 'DistillHook']
    return hook


def test_teachers_are_wider_and_named_as_they_are_trained():
    for path in STUDENTS:
        cfg = Config.fromfile(path)
        hook = distill(cfg)
        teacher = Config.fromfile(hook.teacher_config)
        sizes = [
            sum(p.numel() for p in build_compact_model(config).parameters())
            for config in (cfg, teacher)
        ]
        assert sizes[1] > 3 * sizes[0], path
        length = teacher.train_cfg
        last = f'iter_{length.max_iters}' if 'max_iters' in length else f'epoch_{length.max_epochs}'
        _, folder, file = hook.teacher_ckpt.split('/')
        trained = Config.fromfile(Path(hook.teacher_config).with_name(f'{folder}.py'))
        assert make_compact_config(trained).model == make_compact_config(teacher).model
        expanded = bool(configured_expansions(trained))
        assert file == ('compact_last.pth' if expanded else f'{last}.pth')
        assert teacher.train_dataloader == cfg.train_dataloader
        DefaultScope._instance_dict.clear()


@pytest.mark.parametrize('path', STUDENTS, ids=lambda path: path.stem)
def test_a_student_trains_with_its_teacher(path, data, teachers, tmp_path):
    cfg = load(path, data, tmp_path)
    hook = distill(cfg)
    hook.teacher_ckpt = str(teachers[Path(hook.teacher_config)])
    scalars = train(cfg).message_hub.log_scalars
    total = scalars['train/loss'].data[0]
    assert len(total) == 2
    for name in STUDENTS[path]:
        assert all(scalars[f'train/{name}'].data[0] > 0), name
        assert all(scalars[f'train/{name}'].data[0] < total), name
    if '_expand' not in path.name:
        return
    compact = load_checkpoint(tmp_path / 'compact_last.pth')
    assert compact['meta'][META_KEY]['max_error'] < 1e-4
    stock = build_compact_model(Config.fromfile(tmp_path / 'compact_config.py'))
    stock.load_state_dict(compact['state_dict'], strict=True)


def test_the_dry_run_of_the_plan(data, teachers, tmp_path, capfd):
    path = next(path for path in STUDENTS if '_hint_' in path.name)
    cfg = load(path, data, tmp_path)
    hook = distill(cfg)
    hook.teacher_ckpt = str(teachers[Path(hook.teacher_config)])
    cfg.dump(tmp_path / 'student.py')
    arguments = (tmp_path / 'student.py', '--shape', 32, 32, '--dry-run')
    assert run('plan.py', *arguments) == (0, '')
    assert 'Dry run: one iteration trained' in capfd.readouterr().out
    hook.teacher_ckpt = 'work_dirs/not_trained_yet.pth'
    cfg.dump(tmp_path / 'student.py')
    message = 'plan.py: work_dirs/not_trained_yet.pth: no such checkpoint; name an existing file'
    assert run('plan.py', *arguments) == (1, message)


def test_a_start_from_a_nonlinear_and_from_an_untrained_network(data, tmp_path):
    """Table 8's configs, each from what the one before has written."""
    name = 'smallnet-k7_{}_1xb128-150e_cifar10.py'
    first = load(SMALLNET / name.format('expand-ck-r4_nonlinear'), data, tmp_path / 'first')
    second = load(SMALLNET / name.format('expand-ck-r4_from-nonlinear'), data, tmp_path / 'second')
    untrained = load(SMALLNET / name.format('expand-ck-r4'), data, tmp_path / 'untrained')
    control = load(SMALLNET / name.format('init-ck-r4'), data, tmp_path / 'control')
    train(first)
    second.load_from = str(tmp_path / 'first/epoch_1.pth')
    train(second)
    assert (tmp_path / 'second/compact_last.pth').exists()
    untrained.merge_from_dict({'train_cfg.max_epochs': 0, 'param_scheduler': None})
    train(untrained)
    control.load_from = str(tmp_path / 'untrained/compact_last.pth')
    control.optim_wrapper.optimizer.lr = 0.0
    control.optim_wrapper.optimizer.momentum = 0.0
    start = load_checkpoint(control.load_from)['state_dict']
    trained = train(control).model.state_dict()
    assert all(torch.equal(trained[key], start[key]) for key in start if 'weight' in key)


def test_resnet18_keeps_small_images():
    model = ResNet18(num_classes=10).eval()
    seen = {}
    for name in ('layer1', 'layer4'):
        model.net.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: seen.update({name: output.shape})
        )
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert seen == dict(layer1=(2, 64, 32, 32), layer4=(2, 512, 4, 4))
    # ResNet18's 11,689,512, less 990 classes of 513 and the taps that a 3x3 stem lacks.
    stem = 64 * 3 * (7 * 7 - 3 * 3)
    assert sum(p.numel() for p in model.parameters()) == 11_689_512 - 990 * 513 - stem
