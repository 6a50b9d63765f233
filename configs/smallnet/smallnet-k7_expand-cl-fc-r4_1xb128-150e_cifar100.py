_base_ = 'smallnet-k7_1xb128-150e_cifar100.py'
custom_hooks = [
    dict(type='ExpandHook', include=['features', 'classifier.0'], method='cl+fc', rate=4),
    dict(type='ContractHook'),
]
