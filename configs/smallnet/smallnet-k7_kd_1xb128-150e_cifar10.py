_base_ = 'smallnet-k7_1xb128-150e_cifar10.py'
# Table 1, "w/ KD", of the compact network.
custom_hooks = [
    dict(
        type='DistillHook',
        teacher_config='{{ fileDirname }}/resnet18_1xb128-150e_cifar10.py',
        teacher_ckpt='work_dirs/resnet18_1xb128-150e_cifar10/epoch_150.pth',
        losses=dict(
            loss_kd=dict(type='KDLoss', tau=4.0, student='classifier', teacher='net.fc'),
        ),
    ),
]
