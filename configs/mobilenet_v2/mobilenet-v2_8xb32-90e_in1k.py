# mmpretrain's MobileNetV2 in the paper's training (Sec. 4.1.2); needs mmpretrain.
_base_ = 'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py'

# training schedule
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.0001), _delete_=True
)
param_scheduler = dict(
    type='MultiStepLR', by_epoch=True, milestones=[30, 60], gamma=0.1, _delete_=True
)
train_cfg = dict(by_epoch=True, max_epochs=90, val_interval=1)
