# Table 7 with 50 % of the training labels random.
_base_ = 'cifar10_smallnet_corrupt20.py'
results_dir = '../../resources/studies/cifar10_smallnet_corrupt50'
arms = {
    name: dict(
        arm,
        cfg_options=dict(arm.get('cfg_options', {}), **{'train_dataloader.dataset.fraction': 0.5}),
    )
    for name, arm in _base_.arms.items()
}
