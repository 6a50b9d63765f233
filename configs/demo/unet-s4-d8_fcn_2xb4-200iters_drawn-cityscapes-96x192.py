_base_ = '../unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py'
# One stage and three quarters of the channels less.
crop_size = (96, 192)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        base_channels=16,
        num_stages=4,
        strides=(1, 1, 1, 1),
        enc_num_convs=(2, 2, 2, 2),
        dec_num_convs=(2, 2, 2),
        downsamples=(True, True, True),
        enc_dilations=(1, 1, 1, 1),
        dec_dilations=(1, 1, 1),
    ),
    decode_head=dict(in_channels=16, in_index=3, channels=16),
    auxiliary_head=dict(in_channels=32, in_index=2, channels=16),
)
# What tools/demo/draw_cityscapes.py draws: ten of Cityscapes' classes. The network keeps all 19.
data_root = 'demo_output/data/cityscapes/'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(256, 128), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=4, num_workers=1, dataset=dict(data_root=data_root, pipeline=train_pipeline)
)
val_dataloader = dict(num_workers=1, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(max_iters=200, val_interval=100)
param_scheduler = [dict(type='PolyLR', power=0.9, begin=0, end=200, by_epoch=False)]
optim_wrapper = dict(optimizer=dict(lr=0.05))
default_hooks = dict(checkpoint=dict(interval=100), logger=dict(interval=20))
randomness = dict(seed=0)
