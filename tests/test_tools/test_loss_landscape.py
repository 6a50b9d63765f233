"""The loss landscape: directions, centre, and the same axes for compact and expanded networks."""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn

from mmexpand.analysis.landscape import draw, losses_at, random_direction
from tests.conftest import small_config
from tests.tools_in_process import load, run

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tools/demo'))

from draw_voc import draw_voc  # noqa: E402

TOOL = 'analysis_tools/loss_landscape.py'
FEW = ('--steps', 2, '--batches', 2)


@pytest.fixture(scope='module')
def trained(tmp_path_factory, street):
    """An expanded U-Net, after four iterations."""
    root = tmp_path_factory.mktemp('trained')
    cfg = small_config(street, root / 'work_dir')
    Runner.from_cfg(cfg).train()
    cfg.dump(root / 'small.py')
    return root / 'small.py', root / 'work_dir'


def landscape(config, checkpoint, out, *more) -> dict:
    status, words = run(TOOL, config, checkpoint, '--out-dir', out, *FEW, *more)
    assert status == 0, words
    assert (out / 'landscape.png').stat().st_size > 10_000
    return json.loads((out / 'landscape.json').read_text())


def test_filters_have_the_norms_of_the_networks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    direction = random_direction(model, torch.Generator().manual_seed(1))
    assert set(direction) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        step = direction[name]
        if name in ('0.weight', '3.weight'):
            norms = parameter.flatten(1).norm(dim=1)
            torch.testing.assert_close(step.flatten(1).norm(dim=1), norms)
            assert not torch.allclose(step, parameter)
        else:
            assert not step.any()
    again = random_direction(model, torch.Generator().manual_seed(1))
    assert all(torch.equal(step, again[name]) for name, step in direction.items())
    other = random_direction(model, torch.Generator().manual_seed(2))
    assert not torch.equal(other['0.weight'], direction['0.weight'])


@pytest.mark.parametrize('groups', [1, 2])
def test_filters_of_a_transposed_convolution(groups):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    layer.weight.data *= torch.logspace(0, 3, 6 // groups).view(1, -1, 1, 1)
    step = random_direction(layer, torch.Generator().manual_seed(1))['weight']

    def norms(weight):
        parts = weight.detach().chunk(groups)
        return torch.cat([part.transpose(0, 1).flatten(1).norm(dim=1) for part in parts])

    assert len(norms(step)) == 6
    torch.testing.assert_close(norms(step), norms(layer.weight))
    assert not torch.allclose(step, layer.weight)


def test_what_a_forward_pass_changes_is_put_back():
    """As the running bases of mmseg's EMANet."""
    model = nn.BatchNorm1d(2)
    step = random_direction(model, torch.Generator())
    x = torch.randn(8, 2)

    def loss(network):
        return float(network(x).mean() + network.running_mean.sum())

    found = list(losses_at(model, [step], [(0,), (0,)], loss))
    assert found[0] == found[1]
    assert model.num_batches_tracked == 0


class DropPath(nn.Module):
    pass


def test_heads_are_as_in_training_and_norms_as_in_a_test():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5), DropPath(), nn.Conv2d(2, 2, 1))
    model = load(TOOL).loss_mode(nn.Sequential(model).eval())
    assert model.training
    assert [module.training for module in model[0]] == [False, False, False, True]


def test_labels_are_padded_with_their_images():
    """As those of a training are: in a test nothing looks at them."""
    preprocessor = MODELS.build(
        dict(type='mmseg.SegDataPreProcessor', seg_pad_val=255, test_cfg=dict(size_divisor=16))
    )
    truth = torch.randint(0, 5, (1, 70, 90))
    sample = SegDataSample(gt_sem_seg=PixelData(data=truth), metainfo=dict(img_shape=(70, 90)))
    batch = dict(inputs=[torch.zeros(3, 70, 90)], data_samples=[sample])
    data = load(TOOL).preprocess(preprocessor, batch)
    (found,) = (s.gt_sem_seg.data for s in data['data_samples'])
    assert data['inputs'].shape[-2:] == found.shape[-2:] == (80, 96)
    assert torch.equal(found[:, :70, :90], truth)
    assert (found == 255).sum() == 80 * 96 - 70 * 90


def test_images_of_several_sizes_come_one_by_one():
    images = [torch.zeros(3, height, 8) for height in (8, 8, 9)]
    split = load(TOOL).of_one_size(dict(inputs=images, data_samples=['a', 'b', 'c']))
    assert [part['data_samples'] for part in split] == [['a'], ['b'], ['c']]
    assert all(part['inputs'][0] is image for part, image in zip(split, images, strict=True))
    whole = dict(inputs=images[:2], data_samples=['a', 'b'])
    assert load(TOOL).of_one_size(whole) == [whole]


class Mean(BaseModel):
    def forward(self, inputs, mode):
        return dict(loss=inputs.mean())


def test_every_image_counts_the_same():
    batches = [dict(inputs=torch.ones(3)), dict(inputs=torch.zeros(1))]
    assert load(TOOL).make_loss(batches, seed=0)(Mean()) == 0.75


def test_losses_of_a_bowl():
    """w^2 along its own direction; then the weights are what they were."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(3)
    axis = {'weight': torch.full((1, 1), 3.0)}
    points = [(-1, 0), (0, 0), (1, 0), (1, -2)]
    found = list(losses_at(model, [axis, axis], points, lambda m: float(m.weight) ** 2))
    assert found == [0, 9, 36, 0]
    assert float(model.weight) == 3
    some = losses_at(model, [axis], [(1,), (2,)], lambda m: float(m.weight))
    assert next(some) == 6
    some.close()
    assert float(model.weight) == 3


def test_expanded_and_compact_checkpoints_have_one_landscape(trained, tmp_path):
    config, work_dir = trained
    expanded = landscape(config, work_dir / 'iter_4.pth', tmp_path / 'expanded')
    compact = landscape(config, work_dir / 'compact_last.pth', tmp_path / 'compact')
    assert expanded['steps'] == compact['steps'] == [-1, -0.5, 0, 0.5, 1]
    assert expanded['line'] == expanded['plane'][2]
    assert expanded['plane'] == [pytest.approx(row, rel=1e-4) for row in compact['plane']]
    values = [value for row in expanded['plane'] for value in row]
    assert len(set(values)) == 25
    config = work_dir / 'compact_config.py'
    beside = tmp_path / 'expanded/landscape.json'
    more = '--name', 'stock', '--beside', beside
    stock = landscape(config, work_dir / 'compact_last.pth', tmp_path / 'b', *more)
    assert stock['plane'] == compact['plane']
    assert (expanded['name'], stock['name']) == (f'{work_dir.name}/iter_4', 'stock')


def test_the_centre_is_the_loss_of_the_network(trained, tmp_path):
    config, work_dir = trained
    more = ('--split', 'val', '--cfg-options', 'val_dataloader.batch_size=4')
    found = landscape(config, work_dir / 'compact_last.pth', tmp_path, *more)
    assert found['batches'] == 1
    cfg = Config.fromfile(work_dir / 'compact_config.py')
    cfg.load_from = str(work_dir / 'compact_last.pth')
    cfg.val_dataloader.batch_size = 4
    cfg.work_dir = str(tmp_path)
    runner = Runner.from_cfg(cfg)
    runner.load_or_resume()
    model = runner.model.eval()
    (batch,) = list(runner.val_dataloader)
    with torch.no_grad():
        losses = model(**model.data_preprocessor(batch, False), mode='loss')
    assert found['line'][2] == pytest.approx(float(model.parse_losses(losses)[0]), rel=1e-5)


def test_a_detector(tmp_path):
    """Its boxes are resized with its images, as those of a test are not."""
    draw_voc(tmp_path / 'voc', num_train=4, num_test=4, size=(200, 120))
    config = ROOT / 'configs/demo/yolo-lite_expand-cl-r4_2xb8-400iters_drawn-voc-160x160.py'
    cfg = Config.fromfile(config)
    torch.manual_seed(0)
    model = MODELS.build(dict(cfg.model, _scope_='mmdet'))
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict(), meta=dict(iter=400)), tmp_path / 'net.pth')
    root = f'{tmp_path}/voc/'
    data = [f'{split}_dataloader.dataset.data_root={root}' for split in ('train', 'test')]
    options = ('--split', 'test', '--cfg-options', *data)
    found = landscape(config, tmp_path / 'net.pth', tmp_path / 'out', *options)
    assert all(value > 0 for row in found['plane'] for value in row)
    cfg.merge_from_dict(dict(word.split('=') for word in data))
    args = Namespace(split='test', batches=4, seed=0)
    batches = load(TOOL).read_batches(cfg, args, model)
    samples = {s.img_id: s.gt_instances.bboxes for d in batches for s in d['data_samples']}
    assert len(samples) == 4
    for info in map(DATASETS.build(cfg.test_dataloader.dataset).get_data_info, range(4)):
        boxes = torch.tensor([one['bbox'] for one in info['instances']])
        scale = torch.tensor([160 / 200, 160 / 120] * 2)
        torch.testing.assert_close(samples[info['img_id']], boxes * scale)


class Drawing(BaseModel):
    """A loss of samples that are drawn, as two-stage detectors draw proposals."""

    def forward(self, inputs, mode):
        return dict(loss=torch.rand(1).sum() + np.random.rand())


def test_what_a_loss_draws_is_the_same_at_every_point():
    batches = [dict(inputs=torch.zeros(count, 1)) for count in (1, 2)]
    loss = load(TOOL).make_loss(batches, seed=3)
    assert loss(Drawing()) == loss(Drawing())


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--span', '0'], 'above 0'),
        (['--beside', 'small.py'], 'is not a landscape.json'),
        (
            [
                '--cfg-options',
                'test_dataloader.dataset.pipeline.1.type=Resize',
                'test_dataloader.dataset.pipeline.1.scale=(48,32)',
            ],
            'EncoderDecoder has no loss on the images of test_dataloader.*LoadAnnotations',
        ),
    ],
)
def test_bad_input(trained, tmp_path, capsys, arguments, message):
    config, work_dir = trained
    arguments = [str(config) if word == 'small.py' else word for word in arguments]
    status, words = run(
        TOOL, config, work_dir / 'iter_4.pth', '--out-dir', tmp_path, *FEW, *arguments
    )
    assert status
    assert re.search(message, words + capsys.readouterr().err)


def test_a_landscape_that_is_nowhere_finite_is_not_drawn():
    with pytest.raises(ValueError, match='no loss is finite'):
        draw([dict(name='net', steps=[-1, 0, 1], line=[None] * 3, plane=[[None] * 3] * 3)])
