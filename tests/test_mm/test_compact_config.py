"""The user's config without anything of ours."""

import pytest
from mmengine.config import Config

from mmexpand.mm.compact_config import make_compact_config
from mmexpand.mm.models import build_compact_model, build_expanded_model, configured_expansions
from mmexpand.mm.optim import OPTIONS, ExpandOptimWrapperConstructor
from mmexpand.surgery import named_units


def config(**changes):
    return Config(
        dict(
            dict(
                model=dict(type='Net', backbone=dict(type='UNet')),
                custom_imports=dict(imports=['mmexpand', 'other'], allow_failed_imports=False),
                custom_hooks=[
                    dict(type='ExpandHook', method='cl', rate=4),
                    dict(type='EMAHook'),
                    dict(type='mmengine.ContractHook'),
                ],
                load_from='x.pth',
                resume=True,
                launcher='pytorch',
            ),
            **changes,
        )
    )


def test_hooks_imports_and_loading_go():
    cfg = config()
    cfg.work_dir = 'work_dirs/net'
    before = cfg.pretty_text
    compact = make_compact_config(cfg)
    assert [hook.type for hook in compact.custom_hooks] == ['EMAHook']
    assert 'work_dir' not in compact
    assert compact.custom_imports.imports == ['other']
    assert (compact.resume, compact.load_from, compact.launcher) == (False, None, 'none')
    assert cfg.pretty_text == before
    assert 'xpand' not in compact.pretty_text


def test_options_of_our_optimizer_constructor_go():
    ours = dict(OPTIONS, outer_lr_mult=0.1, clip_factors=True, factor_decay='shared')
    wrapper = dict(
        constructor='ExpandOptimWrapperConstructor', paramwise_cfg=dict(ours, norm_decay_mult=0.0)
    )
    compact = make_compact_config(config(optim_wrapper=wrapper))
    assert compact.optim_wrapper == dict(paramwise_cfg=dict(norm_decay_mult=0.0))
    built = ExpandOptimWrapperConstructor({}, wrapper['paramwise_cfg'])
    assert built.options == compact.optim_wrapper.paramwise_cfg


def test_nothing_empty_is_left():
    compact = make_compact_config(
        config(
            custom_hooks=[dict(type='ExpandHook', method='cl')],
            custom_imports=dict(imports='mmexpand'),
        )
    )
    assert 'custom_hooks' not in compact
    assert 'custom_imports' not in compact


def test_builders_give_way_to_what_they_build():
    inner = dict(
        type='Net',
        backbone=dict(type='mmengine.ExpandBackbone', method='cl', backbone=dict(type='UNet')),
    )
    compact = make_compact_config(
        config(
            model=dict(
                type='ExpandModel', method='cl', model=inner, rate=2, data_preprocessor=dict(a=1)
            )
        )
    )
    assert compact.model == dict(
        type='Net', backbone=dict(type='UNet'), data_preprocessor=dict(a=1)
    )


@pytest.mark.parametrize('network', ['YOLOLite', 'mmdet.YOLOV2Head'])
def test_networks_of_ours_keep_the_import(network):
    compact = make_compact_config(config(model=dict(type='Net', part=dict(type=network))))
    assert 'mmexpand' in compact.custom_imports.imports


def test_expansions_are_found_where_they_stand(seg_cfg):
    cfg = seg_cfg()
    assert [(name, expansion.rate) for name, expansion in configured_expansions(cfg)] == [('', 2)]
    cfg.model.backbone = dict(
        type='ExpandBackbone', method='cl', backbone=cfg.model.backbone, include='encoder', rate=3
    )
    cfg.custom_hooks = []
    assert [(name, expansion.rate) for name, expansion in configured_expansions(cfg)] == [
        ('backbone', 3)
    ]
    names = list(named_units(build_expanded_model(cfg)))
    assert len(names) == 3
    assert all(name.startswith('backbone.encoder') for name in names)
    assert not named_units(build_compact_model(cfg))
    cfg.model = cfg.model
    cfg.model.backbone = cfg.model.backbone.backbone
    with pytest.raises(ValueError, match='expands nothing'):
        build_expanded_model(cfg)


def test_what_is_not_finite_is_read_back():
    cfg = Config(dict(model=dict(type='Net', ranges=[(1.0, float('inf'))], low=float('-inf'))))
    text = make_compact_config(cfg).pretty_text
    assert Config.fromstring(text, '.py').model == cfg.model
