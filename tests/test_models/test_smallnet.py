"""The paper's classifier: Table 6's network, three modes, registered without mmdet."""

import pytest
import torch
from mmengine.registry import MODELS
from torch.nn import functional as F

import mmexpand
from mmexpand.models import SmallNet


@pytest.mark.parametrize(
    ('kernel_size', 'channels', 'parameters'),
    # The first is Table 6's 150.35K.
    [(7, (8, 16, 32, 64), 150346), (7, (8, 16, 32), 66186), (3, (8, 16, 32), 39626)],
)
def test_parameter_counts(kernel_size, channels, parameters):
    model = SmallNet(kernel_size, channels)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize('kernel_size', [3, 5, 7, 9])
def test_kernels_keep_the_size(kernel_size):
    model = SmallNet(kernel_size, (4, 6), hidden=5, num_classes=3, image_size=12)
    assert model(torch.randn(2, 3, 12, 12)).shape == (2, 3)


def test_modes():
    torch.manual_seed(0)
    model = MODELS.build(dict(type='SmallNet', channels=(4, 8), image_size=8)).eval()
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6)
    logits = model(images)
    loss = model(images, labels, mode='loss')['loss']
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    found = model(images, labels, mode='predict')
    assert [int(one['pred_label']) for one in found] == logits.argmax(1).tolist()
    assert [int(one['gt_label']) for one in found] == labels.tolist()


@pytest.mark.parametrize('method', ['cl', 'ck'])
def test_expanded_and_contracted_computes_the_same(method):
    torch.manual_seed(0)
    model = SmallNet(7, (4, 8), image_size=8).double()
    mmexpand.expand_(
        model, mmexpand.ExpandConfig(method, rate=2, init='default', include='features')
    )
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    compact = mmexpand.contract(model)
    assert list(compact.state_dict()) == list(SmallNet(7, (4, 8), image_size=8).state_dict())
    mmexpand.verify(model, compact, lambda network: network(images), tolerance=1e-12)
