# Twice the iterations of bccd_yolo-lite.py; the compact network's mAP is flat from 2,400 on.
_base_ = 'bccd_yolo-lite.py'
lrs = [0.001, 0.0014, 0.005, 0.01]
results_dir = '../../resources/studies/bccd_yolo-lite_4000iters'
longer = {
    'train_cfg.max_iters': 4000,
    'param_scheduler': [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
        dict(type='CosineAnnealingLR', by_epoch=False, begin=100, end=4000),
    ],
}
arms = dict(
    _delete_=True,
    compact=dict(config=_base_.config, cfg_options=longer),
    **{
        arm: dict(config=_base_.config, cfg_options=dict(_base_.arms[arm].cfg_options, **longer))
        for arm in ('bn', 'repvgg_folded')
    },
)
