# Table 7 with 80 % of the training labels random.
_base_ = 'cifar10_smallnet_corrupt20.py'
results_dir = '../../resources/studies/cifar10_smallnet_corrupt80'
arms = {
    name: dict(
        arm,
        cfg_options=dict(arm.get('cfg_options', {}), **{'train_dataloader.dataset.fraction': 0.8}),
    )
    for name, arm in _base_.arms.items()
}
