_base_ = '../yolo_lite/yolo-lite_1xb64-600k_voc0712-224x224.py'
# What tools/demo/draw_voc.py draws: six of VOC's classes. The network keeps all twenty.
data_root = 'demo_output/data/voc/'
input_size = (160, 160)
model = dict(
    data_preprocessor=dict(
        batch_augments=[
            dict(
                type='BatchSyncRandomResize',
                random_size_range=(128, 192),
                interval=10,
                size_divisor=32,
            )
        ]
    ),
    bbox_head=dict(anchor_warmup_iters=50),
)
resize = dict(type='Resize', scale=input_size, keep_ratio=False)
train_pipeline = [*_base_.train_pipeline[:-2], resize, _base_.train_pipeline[-1]]
test_pipeline = [_base_.test_pipeline[0], resize, *_base_.test_pipeline[2:]]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type='VOCDataset',
        data_root=data_root,
        ann_file='VOC2007/ImageSets/Main/trainval.txt',
        data_prefix=dict(sub_data_root='VOC2007/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(num_workers=1, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(max_iters=400, val_interval=200)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=50, end=400),
]
optim_wrapper = dict(optimizer=dict(lr=0.004), clip_grad=dict(max_norm=10))
default_hooks = dict(checkpoint=dict(interval=200, max_keep_ckpts=1), logger=dict(interval=20))
randomness = dict(seed=0)
