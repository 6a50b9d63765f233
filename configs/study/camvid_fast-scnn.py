# Do blocks with norms help a stock compact segmentor? mmseg's Fast-SCNN on CamVid.
baseline = 'compact'
metric = 'mIoU'
lrs = [0.05, 0.1, 0.2]
seeds = [0, 1, 2, 3, 4]
tune_seeds = [0]
results_dir = '../../resources/studies/camvid_fast-scnn'
jobs = 2
channels_last = True

config = '../fast_scnn/fast-scnn_1xb8-3000iters_camvid-160x224.py'
root = '../shared/data/camvid-cityscapes/'
data = {f'{split}_dataloader.dataset.data_root': root for split in ('train', 'val', 'test')}


def arm(**fields):
    hook = dict(type='ExpandHook', include=['backbone', 'decode_head.convs'], **fields)
    imports = dict(imports=['mmexpand'], allow_failed_imports=False)
    return dict(config=config, cfg_options=dict(data, custom_hooks=[hook], custom_imports=imports))


arms = dict(
    compact=dict(config=config, cfg_options=data),
    repvgg_folded=arm(method='repvgg', forward='folded'),  # The 3x3 kernels, depthwise ones.
    mobileone_folded=arm(method='mobileone', rate=4, forward='folded'),  # The 1x1 kernels too.
)
