# Table 7: does an expanded network memorise less? 9x9 kernels, 20 % of the training labels random,
# the authors' learning rate and schedule, 60 epochs of every ninth training image. The validation
# split of this study is the training images with their random labels: the training error.
baseline = 'compact'
metric = 'accuracy'
lrs = [0.01]
seeds = [0, 1, 2]
tune_seeds = [0]
results_dir = '../../resources/studies/cifar10_smallnet_corrupt20'
jobs = 2
channels_last = True

config = '../corrupted_cifar10/smallnet-k9_1xb128-150e_cifar10-corrupt20.py'


def arm(**expand):
    images = dict(
        type='ZippedImages',
        data_root='data/cifar10/',
        ann_file='cifar10.zip',
        split='train',
        indices=list(range(0, 45000, 9)),
    )
    corrupt = dict(type='CorruptLabels', fraction=0.2, dataset=images)
    options = {
        'train_dataloader.dataset': corrupt,
        'val_dataloader.dataset': corrupt,
        # As a name: the key in a dict is lost where another study takes over these arms.
        'val_dataloader.dataset._delete_': True,
        'train_cfg.max_epochs': 60,
        'train_cfg.val_interval': 20,
        'default_hooks.checkpoint.interval': 20,
        'param_scheduler': [dict(type='MultiStepLR', milestones=[20, 40], gamma=0.1)],
    }
    if expand:
        options['custom_hooks'] = [dict(type='ExpandHook', include='features', rate=4, **expand)]
    return dict(config=config, cfg_options=options, lr=0.01)


arms = dict(compact=arm(), cl=arm(method='cl'), ck=arm(method='ck'))
