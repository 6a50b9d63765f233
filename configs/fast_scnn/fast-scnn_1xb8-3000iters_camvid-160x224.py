_base_ = '../unet/unet-s4-d8_fcn_1xb8-1500iters_camvid-96x128.py'
# mmseg's Fast-SCNN as it is, on whole CamVid images: it works at an eighth of their size.
crop_size = (160, 224)
norm_cfg = dict(type='BN', requires_grad=True, momentum=0.01)
loss_decode = dict(type='CrossEntropyLoss', use_sigmoid=True)
auxiliary = dict(
    type='FCNHead',
    channels=32,
    num_convs=1,
    num_classes=19,
    norm_cfg=norm_cfg,
    concat_input=False,
    loss_decode=dict(loss_decode, loss_weight=0.4),
)
model = dict(
    _delete_=True,
    type='EncoderDecoder',
    data_preprocessor=dict(_base_.model.data_preprocessor, size=crop_size),
    backbone=dict(type='FastSCNN', norm_cfg=norm_cfg),
    decode_head=dict(
        type='DepthwiseSeparableFCNHead',
        in_channels=128,
        channels=128,
        concat_input=False,
        num_classes=19,
        in_index=-1,
        norm_cfg=norm_cfg,
        loss_decode=dict(loss_decode, loss_weight=1),
    ),
    auxiliary_head=[
        dict(auxiliary, in_channels=128, in_index=-2),
        dict(auxiliary, in_channels=64, in_index=-3),
    ],
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
train_pipeline = [
    *_base_.train_pipeline[:2],
    dict(type='RandomResize', scale=(240, 176), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    *_base_.train_pipeline[4:],
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(240, 176), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

train_cfg = dict(max_iters=3000, val_interval=1000)
param_scheduler = [dict(type='CosineAnnealingLR', T_max=3000, by_epoch=False)]
