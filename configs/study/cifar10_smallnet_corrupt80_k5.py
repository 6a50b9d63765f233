# cifar10_smallnet_corrupt80.py with 5x5 kernels.
_base_ = 'cifar10_smallnet_corrupt80.py'
results_dir = '../../resources/studies/cifar10_smallnet_corrupt80_k5'
changed = {'model.kernel_size': 5}
arms = {name: dict(cfg_options=changed) for name in _base_.arms}
