# Table 7 with 20 % of the training labels random and 5x5 kernels.
_base_ = 'cifar10_smallnet_corrupt20.py'
results_dir = '../../resources/studies/cifar10_smallnet_corrupt20_k5'
changed = {
    'model.kernel_size': 5,
}
arms = {
    name: dict(arm, cfg_options=dict(arm.cfg_options, **changed))
    for name, arm in _base_.arms.items()
}
