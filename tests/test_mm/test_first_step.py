"""Norms in branches that a training does not suit: said in its first step."""

from collections import Counter

import pytest
import torch
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import mmexpand
from mmexpand.mm.norm_check import count_calls
from tests.runs import NormEval, log_of, train

REPEATED = 'run several times in a training step, backbone.encoder.0.0.convs.0.conv (bn, 2 times)'
IDLE = 'trained with norms in eval mode with initial statistics'
TWO = {'train_cfg.max_iters': 2}


def hooks(method='bn', include='backbone.encoder.0', **expand):
    expand = dict(type='ExpandHook', include=include, method=method, **expand)
    return [expand, dict(type='ContractHook')]


@MODELS.register_module()
class RunsTwice(EncoderDecoder):
    """Has its layers see inputs of two distributions, as a head that levels share."""

    def extract_feat(self, inputs):
        super().extract_feat(5 + 8 * inputs)
        return super().extract_feat(inputs)


@pytest.mark.parametrize('by', ['hook', 'builder'])
def test_layers_with_norms_that_run_twice(seg_cfg, by):
    cfg = seg_cfg(custom_hooks=hooks(), **TWO, **{'model.type': 'RunsTwice'})
    if by == 'builder':
        expand = {key: value for key, value in cfg.custom_hooks[0].items() if key != 'type'}
        cfg.model = dict(type='ExpandModel', model=cfg.model, **expand)
        cfg.custom_hooks = cfg.custom_hooks[1:]
    assert train(cfg).iter == 2
    assert log_of(cfg).count(REPEATED) == 1
    assert "exclude=['backbone.encoder.0.0.convs.0.conv']" in log_of(cfg)


@pytest.mark.parametrize(
    'changes',
    [
        {'custom_hooks': hooks()},
        {'custom_hooks': hooks('cl'), 'model.type': 'RunsTwice'},
        # It runs the layers again in the backward pass.
        {'custom_hooks': hooks(), 'activation_checkpointing': ['backbone.encoder.0']},
    ],
    ids=['once', 'no norms', 'checkpointing'],
)
def test_no_warning_of_others(seg_cfg, changes):
    cfg = seg_cfg(**TWO, **changes)
    train(cfg)
    assert 'run several times' not in log_of(cfg)


def test_the_largest_number_of_calls_counts():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x, times):
            for _ in range(times):
                x = self.conv(x)
            return x

    model, calls = Several(), Counter()
    mmexpand.expand_(model, method='bn')
    with count_calls(model, calls):
        for times in (1, 3, 2):
            model(torch.randn(2, 3, 4, 4), times)
    assert calls == {'conv': 3}


def test_norms_that_stay_in_eval_mode_from_the_start(seg_cfg):
    cfg = seg_cfg(custom_hooks=hooks('repvgg'), **TWO, **{'model.type': 'NormEval'})
    train(cfg)
    assert log_of(cfg).count(IDLE) == 1
    assert 'backbone.encoder.0.0.convs.0.conv first: nothing is normalised' in log_of(cfg)


def test_norms_with_statistics_may_stay_in_eval_mode(seg_cfg):
    cfg = seg_cfg(custom_hooks=hooks('repvgg'), **TWO)
    train(cfg)
    assert IDLE not in log_of(cfg)
    tuned = seg_cfg(
        custom_hooks=hooks('repvgg'),
        load_from=f'{cfg.work_dir}/iter_2.pth',
        work_dir=cfg.work_dir + '2',
        **TWO,
        **{'model.type': 'NormEval'},
    )
    train(tuned)
    assert IDLE not in log_of(tuned)
    frozen = seg_cfg(custom_hooks=hooks('repvgg'), work_dir=cfg.work_dir + '3', **TWO)
    frozen.model.type = 'FrozenNormEval'
    train(frozen)
    assert IDLE not in log_of(frozen)


@MODELS.register_module()
class FrozenNormEval(NormEval):
    """Has a backbone that is not trained at all."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.backbone.requires_grad_(False)


@MODELS.register_module()
class Pools(EncoderDecoder):
    """Has a convolution on a map that is pooled to one pixel."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.pooled = nn.Conv2d(4, 4, 1)

    def extract_feat(self, inputs):
        *rest, last = super().extract_feat(inputs)
        return [*rest, last + self.pooled(last.mean((2, 3), keepdim=True))]


@pytest.mark.parametrize('forward', ['auto', 'folded'])
def test_one_value_per_channel(seg_cfg, forward):
    how = hooks(include='pooled', forward=forward)
    options = {'model.type': 'Pools', 'train_dataloader.batch_size': 1}
    cfg = seg_cfg(custom_hooks=how, **options)
    words = r"^pooled: the norms in its branches \(method 'bn'\) get one.*exclude='pooled'"
    with pytest.raises(ValueError, match=words):
        train(cfg)
    options['train_dataloader.batch_size'] = 2
    assert train(seg_cfg(custom_hooks=how, work_dir=cfg.work_dir + '2', **options)).iter == 4


def test_one_value_in_the_last_batch_of_an_epoch(seg_cfg):
    cfg = seg_cfg(
        custom_hooks=hooks(include='pooled'),
        param_scheduler=[],
        train_cfg=dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=1),
        **{
            'model.type': 'Pools',
            'train_dataloader.batch_size': 3,
            'train_dataloader.sampler.type': 'DefaultSampler',
            'default_hooks.checkpoint.by_epoch': True,
        },
    )
    with pytest.raises(ValueError, match=r'^pooled: the norms.*drop_last=True'):
        train(cfg)


def test_nothing_is_left_on_the_model(seg_cfg):
    before = dict(_global_optimizer_pre_hooks)
    runner = train(seg_cfg(custom_hooks=hooks(), **TWO))
    left = [
        name
        for name, module in runner.model.named_modules()
        if (module._forward_hooks or module._forward_pre_hooks) and not name.endswith('.norm')
    ]
    assert left == []
    assert before == _global_optimizer_pre_hooks
