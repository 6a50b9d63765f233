_base_ = '../demo/unet-s4-d8_fcn_2xb4-200iters_drawn-cityscapes-96x192.py'
# CamVid in Cityscapes' layout, labels mapped to Cityscapes' train ids (11 of them occur).
# A U-Net of 8 base channels on quarter images: minutes on a CPU.
data_root = 'data/camvid/'
crop_size = (96, 128)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(base_channels=8, norm_cfg=dict(type='BN', requires_grad=True)),
    decode_head=dict(in_channels=8, channels=8, norm_cfg=dict(type='BN', requires_grad=True)),
    auxiliary_head=None,
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(176, 128), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(176, 128), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
suffix = dict(img_suffix='_leftImg8bit.png', seg_map_suffix='_gtFine_labelTrainIds.png')
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, pipeline=train_pipeline, **suffix),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, pipeline=test_pipeline, **suffix),
)
test_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        pipeline=test_pipeline,
        data_prefix=dict(img_path='leftImg8bit/test', seg_map_path='gtFine/test'),
        **suffix,
    ),
)
val_evaluator = dict(iou_metrics=['mIoU'])
test_evaluator = val_evaluator

train_cfg = dict(max_iters=1500, val_interval=300)
param_scheduler = [dict(type='CosineAnnealingLR', T_max=1500, by_epoch=False)]
optim_wrapper = dict(optimizer=dict(lr=0.1, momentum=0.9, weight_decay=0.0005))
default_hooks = dict(checkpoint=dict(interval=300, max_keep_ckpts=1, save_best=None))
