# Table 7 with 80 % of the training labels random and 9x9 kernels.
_base_ = 'cifar10_smallnet_corrupt20.py'
results_dir = '../../resources/studies/cifar10_smallnet_corrupt80'
fraction = 0.8
changed = {
    'train_dataloader.dataset.fraction': fraction,
    'val_dataloader.dataset.fraction': fraction,
}
arms = {name: dict(cfg_options=changed) for name in _base_.arms}
