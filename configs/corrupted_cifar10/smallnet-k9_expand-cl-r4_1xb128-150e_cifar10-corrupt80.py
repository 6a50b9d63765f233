_base_ = 'smallnet-k9_1xb128-150e_cifar10-corrupt80.py'
custom_hooks = [
    dict(type='ExpandHook', include='features', method='cl', rate=4),
    dict(type='ContractHook'),
]
