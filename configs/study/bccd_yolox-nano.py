# Do blocks with norms help a stock compact detector? mmdet's YOLOX-nano on BCCD.
baseline = 'compact'
metric = 'pascal_voc/mAP'
lrs = [0.01, 0.02, 0.04, 0.08]
seeds = [0, 1, 2, 3, 4]
tune_seeds = [0]
results_dir = '../../resources/studies/bccd_yolox-nano'
jobs = 2
channels_last = True

config = '../yolox/yolox-nano_1xb8-2000iters_bccd-160x160.py'
root = '../shared/data/bccd-voc/'
data = {f'{split}_dataloader.dataset.data_root': root for split in ('train', 'val', 'test')}


def arm(**fields):
    hooks = [dict(type='NumClassCheckHook'), dict(type='ExpandHook', **fields)]
    return dict(config=config, cfg_options=dict(data, custom_hooks=hooks))


arms = dict(
    compact=dict(config=config, cfg_options=data),
    # What norms alone do, behind those that it has: of the layers that RepVGG's block takes.
    bn=arm(method='bn', include='kernel:3x3'),
    repvgg=arm(method='repvgg'),
    repvgg_folded=arm(method='repvgg', forward='folded'),  # The 3x3 kernels, most are depthwise.
    mobileone_folded=arm(method='mobileone', rate=4, forward='folded'),  # The 1x1 kernels too.
)
