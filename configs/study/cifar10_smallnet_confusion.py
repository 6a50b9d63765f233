# Figure 3: gradient confusion while SmallNet trains in the authors' setting. The hook writes
# gradient_confusion.json into each run's folder; Figure 4 takes the checkpoints of these runs.
_base_ = 'cifar10_smallnet.py'
seeds = [0]
results_dir = '../../resources/studies/cifar10_smallnet_confusion'


def arm(**fields):
    hooks = [dict(type='GradientConfusionHook', pairs=30)]
    if fields:
        hooks.append(dict(type='ExpandHook', include='features', rate=4, **fields))
    options = dict(_base_.authors, custom_hooks=hooks)
    return dict(config=_base_.config, cfg_options=options, lr=0.01)


arms = dict(_delete_=True, compact=arm(), cl=arm(method='cl'), ck=arm(method='ck'))
