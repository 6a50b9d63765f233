"""A study of seconds: dark and bright images in a zip, a network of one convolution."""

import zipfile
from dataclasses import replace

import cv2
import numpy as np
import pytest

from mmexpand.study import Run, load_study
from mmexpand.study.run import write_json

CONFIG = """
custom_imports = dict(imports=['mmexpand'], allow_failed_imports=False)
default_scope = 'mmengine'
data_preprocessor = dict(
    type='CIFARDataPreprocessor', mean=[127.5] * 3, std=[64.0] * 3, padding=1)
model = dict(type='SmallNet', kernel_size=3, channels=(4,), hidden=4, num_classes=2, image_size=8)


def loader(split):
    sampler = dict(type='InfiniteSampler') if split == 'train' else dict(type='DefaultSampler',
                                                                         shuffle=False)
    data = dict(type='ZippedImages', data_root={root!r}, ann_file='images.zip', split=split,
                val_images=8)
    return dict(batch_size=8, num_workers=0, sampler=sampler, dataset=data)


train_dataloader, val_dataloader, test_dataloader = loader('train'), loader('val'), loader('test')
val_evaluator = test_evaluator = dict(type='TopAccuracy')
train_cfg = dict(type='IterBasedTrainLoop', max_iters=8, val_interval=2)
val_cfg, test_cfg = dict(type='ValLoop'), dict(type='TestLoop')
optim_wrapper = dict(optimizer=dict(type='SGD', lr=1.0, momentum=0.9))
default_hooks = dict(
    logger=dict(type='LoggerHook', log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False, max_keep_ckpts=1))
log_processor = dict(by_epoch=False)
"""

STUDY = """
baseline = 'compact'
metric = 'accuracy'
lrs = [0.1, 0.01]
seeds = [0, 1]
tune_seeds = [0]
results_dir = 'results'
jobs = 2
arms = dict(
    compact=dict(config='net.py'),
    cl=dict(config='net.py', cfg_options=dict(
        custom_hooks=[dict(type='ExpandHook', method='cl', include='features', rate=2)])),
)
"""


@pytest.fixture
def write_study(tmp_path, monkeypatch):
    """Writes STUDY, with lines added, its config and its images, and loads it."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'images.zip')
    (tmp_path / 'net.py').write_text(CONFIG.replace('{root!r}', repr(str(tmp_path))))

    def write(more=''):
        (tmp_path / 'small.py').write_text(STUDY + more)
        return load_study(tmp_path / 'small.py')

    return write


def write_images(path):
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, 'w') as archive:
        for split, count in (('train', 16), ('test', 8)):
            for name, level in (('bright', 150), ('dark', 50)):
                for index in range(count):
                    image = rng.integers(level, level + 50, (8, 8, 3), dtype=np.uint8)
                    encoded = cv2.imencode('.png', image)[1].tobytes()
                    archive.writestr(f'{split}/{name}/{index:02d}.png', encoded)


@pytest.fixture
def study(write_study):
    return write_study()


@pytest.fixture
def put():
    """Writes a result as a run would."""

    def write(study, arm, lr, seed, val=50.0, test=None, **changes):
        result = dict(study=study.name, arm=arm, lr=lr, seed=seed, status='ok')
        if 'reason' not in changes:
            test = val if test is None else test
            result |= dict(val=dict(accuracy=val), test=dict(accuracy=test))
            result |= dict(curve=[[2, val - 5], [4, val]], loss=[[2, 0.5]], seconds=10.0, steps=4)
            result |= dict(period=[100 + seed, 110 + seed])
        write_json(result | changes, study.result_path(Run(study.arm(arm), lr, seed)))

    return write


@pytest.fixture
def with_arm():
    """A study with an arm of its own cfg_options."""

    def change(study, name, **options):
        arm = study.arm(name)
        arm = replace(arm, cfg_options=arm.cfg_options | options)
        return replace(study, arms=study.arms | {name: arm})

    return change
