# Does the published gain of CK on 7x7 kernels stand once every arm has its own learning rate?
# CIFAR-10, SmallNet; a tenth of the authors' 150 epochs.
baseline = 'compact'
metric = 'accuracy'
lrs = [0.003, 0.01, 0.03, 0.1, 0.3]
seeds = [0, 1, 2, 3, 4]
tune_seeds = [0]
results_dir = '../../resources/studies/cifar10_smallnet'
jobs = 2
channels_last = True

config = '../smallnet/smallnet-k7_1xb128-150e_cifar10.py'
max_epochs = 15
short = {
    'train_cfg.max_epochs': max_epochs,
    'train_cfg.val_interval': 5,
    'default_hooks.checkpoint.interval': 5,
}
# The authors' setting: 0.01, a tenth every third of the time, no decay.
authors = dict(
    short,
    param_scheduler=[
        dict(type='MultiStepLR', milestones=[max_epochs // 3, max_epochs * 2 // 3], gamma=0.1)
    ],
)
# What is tuned: the same with cosine and a usual decay.
tuned = dict(
    short,
    param_scheduler=[
        dict(type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, convert_to_iter_based=True)
    ],
)
tuned['optim_wrapper.optimizer.weight_decay'] = 5e-4


def expand(base, **fields):
    return dict(base, custom_hooks=[dict(type='ExpandHook', include='features', **fields)])


cl, ck = dict(method='cl', rate=4), dict(method='ck', rate=4)
arms = dict(
    compact=dict(config=config, cfg_options=tuned),
    ck=dict(config=config, cfg_options=expand(tuned, **ck)),
    compact_authors=dict(config=config, cfg_options=authors, lr=0.01),
    ck_authors=dict(config=config, cfg_options=expand(authors, **ck), lr=0.01),
    cl=dict(config=config, cfg_options=expand(tuned, **cl)),
    cl_authors=dict(config=config, cfg_options=expand(authors, **cl), lr=0.01),
    repvgg_folded=dict(config=config, cfg_options=expand(tuned, method='repvgg', forward='folded')),
    repvgg_ck_folded=dict(
        config=config,
        cfg_options=expand(tuned, method='repvgg', main='ck', rate=4, forward='folded'),
    ),
)
