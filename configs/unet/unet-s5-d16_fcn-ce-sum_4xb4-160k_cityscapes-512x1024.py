_base_ = [
    'mmseg::_base_/models/fcn_unet_s5-d16.py',
    '../_base_/datasets/cityscapes_albu.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/schedule_unet_160k.py',
]
crop_size = (512, 1024)
data_preprocessor = dict(size=crop_size, test_cfg=dict(size_divisor=16))
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(
        num_classes=19,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, reduction='sum'),
    ),
    # The paper's U-Net is trained by its output alone.
    auxiliary_head=None,
    # model training and testing settings
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
train_dataloader = dict(batch_size=4, num_workers=4)
val_dataloader = dict(batch_size=1, num_workers=4)
test_dataloader = val_dataloader
val_evaluator = dict(iou_metrics=['mIoU', 'mFscore'])
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best='mIoU', max_keep_ckpts=3))
