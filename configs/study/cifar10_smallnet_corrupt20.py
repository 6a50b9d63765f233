# Table 7: does an expanded network memorise less? 9x9 kernels, 20 % of the training labels random,
# the authors' schedule and learning rate, all 150 epochs.
baseline = 'compact'
metric = 'accuracy'
lrs = [0.01]
seeds = [0, 1, 2, 3, 4]
tune_seeds = [0]
results_dir = '../../resources/studies/cifar10_smallnet_corrupt20'
jobs = 2
channels_last = True

config = '../corrupted_cifar10/smallnet-k9_1xb128-150e_cifar10-corrupt20.py'


def arm(method, include='features'):
    hook = dict(type='ExpandHook', include=include, method=method, rate=4)
    return dict(config=config, cfg_options=dict(custom_hooks=[hook]), lr=0.01)


arms = dict(
    compact=dict(config=config, lr=0.01),
    # The layer that the paper expands: the first of the two linear ones.
    fc=arm('fc', include='classifier.0'),
    cl=arm('cl'),
    ck=arm('ck'),
)
