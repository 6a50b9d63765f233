# Which blocks help a detector without norms? YOLO-LITE on BCCD.
baseline = 'compact'
metric = 'pascal_voc/mAP'
lrs = [0.00025, 0.0005, 0.001, 0.0014, 0.002, 0.005, 0.01, 0.02]
seeds = [0, 1, 2, 3, 4]
tune_seeds = [0]
results_dir = '../../resources/studies/bccd_yolo-lite'
jobs = 2
channels_last = True

config = '../yolo_lite/yolo-lite_1xb8-2000iters_bccd-160x160.py'
# Half the iterations, for the studies that are based on this one.
short = {
    'train_cfg.max_iters': 1000,
    'train_cfg.val_interval': 1000,
    'default_hooks.checkpoint.interval': 1000,
    'param_scheduler': [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
        dict(type='CosineAnnealingLR', by_epoch=False, begin=100, end=1000),
    ],
}


def arm(**fields):
    hooks = [
        dict(type='NumClassCheckHook'),
        dict(type='ExpandHook', include='backbone', **fields),
    ]
    return dict(config=config, cfg_options=dict(custom_hooks=hooks))


arms = dict(
    compact=dict(config=config),
    bn=arm(method='bn', forward='layerwise'),  # What norms alone do, without branches.
    bn_folded=arm(method='bn', forward='folded'),
    repvgg=arm(method='repvgg', forward='layerwise'),
    repvgg_folded=arm(method='repvgg', forward='folded'),
    repvgg_cl_folded=arm(method='repvgg', main='cl', rate=4, forward='folded'),
    mobileone_folded=arm(method='mobileone', rate=4, forward='folded', exclude='kernel:1x1'),
    orepa=arm(method='orepa', init='preserve'),
    rep=arm(method='rep', init='preserve'),
    do=arm(method='do', init='preserve'),
    cl_shortcut=arm(method='cl', rate=4, init='preserve', shortcut=True),
    cl_preserve=arm(method='cl', rate=4, init='preserve'),
    cl=arm(method='cl', rate=4),
    dbb=arm(method='dbb', forward='layerwise'),
    dbb_folded=arm(method='dbb', forward='folded'),
)
