# Twice the iterations of camvid_unet.py: is the gain more than faster learning?
_base_ = 'camvid_unet.py'
lrs = [0.03, 0.1, 0.2]
tune_seeds = [0]
results_dir = '../../resources/studies/camvid_unet_3000iters'
longer = {
    'train_cfg.max_iters': 3000,
    'param_scheduler': [dict(type='CosineAnnealingLR', T_max=3000, by_epoch=False)],
}
arms = dict(
    _delete_=True,
    compact=dict(config=_base_.config, cfg_options=longer),
    **{
        arm: dict(config=_base_.config, cfg_options=dict(_base_.arms[arm].cfg_options, **longer))
        for arm in ('bn', 'repvgg_folded', 'mobileone_folded')
    },
)
