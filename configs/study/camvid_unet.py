# Which blocks help a small U-Net with batch norms? CamVid, quarter images.
baseline = 'compact'
metric = 'mIoU'
lrs = [0.03, 0.1, 0.2, 0.4]
seeds = [0, 1, 2, 3, 4]
tune_seeds = [0, 1]
results_dir = '../../resources/studies/camvid_unet'
jobs = 2
channels_last = True

config = '../unet/unet-s4-d8_fcn_1xb8-1500iters_camvid-96x128.py'


def arm(**fields):
    # The paper expands the encoder; here every 3x3 of the network is, the head's too.
    hook = dict(type='ExpandHook', include=[r're:backbone\..*conv$', 'decode_head.convs'], **fields)
    imports = dict(imports=['mmexpand'], allow_failed_imports=False)
    return dict(config=config, cfg_options=dict(custom_hooks=[hook], custom_imports=imports))


arms = dict(
    compact=dict(config=config),
    bn=arm(method='bn', forward='layerwise'),
    repvgg=arm(method='repvgg', forward='layerwise'),
    repvgg_folded=arm(method='repvgg', forward='folded'),
    repvgg_cl_folded=arm(method='repvgg', main='cl', rate=4, forward='folded'),
    mobileone_folded=arm(method='mobileone', rate=4, forward='folded', exclude='kernel:1x1'),
    orepa=arm(method='orepa'),
    rep=arm(method='rep'),
    do=arm(method='do', init='preserve'),
    cl_shortcut=arm(method='cl', rate=4, init='preserve', shortcut=True),
    cl=arm(method='cl', rate=4),
    cl_preserve=arm(method='cl', rate=4, init='preserve'),
    acnet=arm(method='acnet', forward='layerwise'),
    dbb=arm(method='dbb', forward='layerwise'),
    dbb_folded=arm(method='dbb', forward='folded'),
)
