_base_ = 'smallnet-k7_1xb128-150e_cifar10.py'
# The teacher of the paper's knowledge transfer. Its training is not said; this one is usual.
model = dict(_delete_=True, type='ResNet18', num_classes=10)
optim_wrapper = dict(optimizer=dict(lr=0.1, weight_decay=5e-4))
param_scheduler = [
    dict(type='CosineAnnealingLR', T_max=150, by_epoch=True, convert_to_iter_based=True)
]
