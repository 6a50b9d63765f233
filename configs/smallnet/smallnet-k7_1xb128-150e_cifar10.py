_base_ = ['../_base_/models/smallnet.py', '../_base_/datasets/cifar10_zip.py']
# SmallNet and its data set are ours.
custom_imports = dict(imports=['mmexpand'], allow_failed_imports=False)
default_scope = 'mmengine'

# training schedule: the authors' CIFAR code
max_epochs = 150
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=10)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
param_scheduler = [
    dict(type='MultiStepLR', milestones=[max_epochs // 3, max_epochs * 2 // 3], gamma=0.1)
]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=100),
    checkpoint=dict(type='CheckpointHook', interval=10, max_keep_ckpts=1),
)
