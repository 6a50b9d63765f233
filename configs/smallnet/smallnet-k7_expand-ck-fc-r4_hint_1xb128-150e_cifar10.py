_base_ = 'smallnet-k7_1xb128-150e_cifar10.py'
# Hint-based transfer to the ExpandNet-CK+FC of Table 1.
custom_hooks = [
    dict(type='ExpandHook', include=['features', 'classifier.0'], method='ck+fc', rate=4),
    dict(
        type='DistillHook',
        teacher_config='{{ fileDirname }}/resnet18_1xb128-150e_cifar10.py',
        teacher_ckpt='work_dirs/resnet18_1xb128-150e_cifar10/epoch_150.pth',
        losses=dict(
            loss_hint=dict(
                type='HintLoss',
                in_channels=32,
                out_channels=512,
                student='features',
                teacher='net.layer4',
            ),
        ),
    ),
    dict(type='ContractHook'),
]
