_base_ = 'smallnet-k7_1xb128-150e_cifar10.py'
# A teacher for a CPU: 3x3 kernels and four times the channels, 15 epochs in 15 minutes on one core.
model = dict(kernel_size=3, channels=(32, 64, 128), hidden=256)
max_epochs = 15
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
optim_wrapper = dict(optimizer=dict(lr=0.1, weight_decay=5e-4))
param_scheduler = [
    dict(type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, convert_to_iter_based=True)
]
default_hooks = dict(checkpoint=dict(interval=5))
