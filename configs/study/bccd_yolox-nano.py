# Do blocks with norms help a stock compact detector? mmdet's YOLOX-nano on BCCD.
_base_ = 'bccd_yolo-lite.py'
lrs = [0.01, 0.02, 0.04, 0.08, 0.16]
results_dir = '../../resources/studies/bccd_yolox-nano'
config = '../yolox/yolox-nano_1xb8-2000iters_bccd-160x160.py'
stages = [f'backbone.stage{stage}.0' for stage in (1, 2, 3, 4)]
downsampling = ['backbone.stem', *stages, 'neck.downsamples']


def arm(**fields):
    hooks = [dict(type='NumClassCheckHook'), dict(type='ExpandHook', **fields)]
    return dict(config=config, cfg_options=dict(custom_hooks=hooks))


arms = dict(
    _delete_=True,
    compact=dict(config=config),
    # The effect of norms alone, on the layers that RepVGG's block takes.
    bn=arm(method='bn', include='kernel:3x3', forward='layerwise'),
    repvgg=arm(method='repvgg', forward='layerwise'),
    repvgg_folded=arm(method='repvgg', forward='folded'),  # The 3x3 kernels, most are depthwise.
    mobileone_folded=arm(method='mobileone', rate=4, forward='folded'),  # The 1x1 kernels too.
    # The stem and the downsampling layers alone, as in FastViT.
    mobileone_down_folded=arm(method='mobileone', rate=4, include=downsampling, forward='folded'),
)
