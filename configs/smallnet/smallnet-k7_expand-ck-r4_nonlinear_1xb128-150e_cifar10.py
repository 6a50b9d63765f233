_base_ = 'smallnet-k7_1xb128-150e_cifar10.py'
# ReLU between the factors: what smallnet-k7_expand-ck-r4_from-nonlinear starts from.
custom_hooks = [
    dict(type='ExpandHook', include='features', method='ck', rate=4, nonlinear='relu'),
]
