_base_ = '../demo/yolo-lite_2xb8-400iters_drawn-voc-160x160.py'
# BCCD: photographs of blood cells in VOC's layout. Minutes on a CPU.
data_root = 'data/bccd/'
# Not VOCDataset: VOCMetric would print VOC's class names for a folder called VOC2007.
common = dict(
    type='XMLDataset', data_root=data_root, metainfo=dict(classes=('RBC', 'WBC', 'Platelets'))
)
model = dict(
    bbox_head=dict(
        num_classes=3,
        anchor_warmup_iters=50,
        # Clustered from the training boxes; VOC's fit cells badly.
        anchor_generator=dict(
            base_sizes=[[(9.8, 12.7), (25.2, 28.3), (24.2, 34.3), (28.8, 36.0), (53.8, 65.0)]]
        ),
    )
)
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(ann_file='VOC2007/ImageSets/Main/train.txt', **common),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(ann_file='VOC2007/ImageSets/Main/val.txt', **common),
)
test_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(ann_file='VOC2007/ImageSets/Main/test.txt', **common),
)
train_cfg = dict(max_iters=2000, val_interval=400)
# The best of its study; at 0.002 and above the network does not train.
optim_wrapper = dict(optimizer=dict(lr=0.001))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=100, end=2000),
]
default_hooks = dict(checkpoint=dict(interval=400, max_keep_ckpts=1, save_best=None))
