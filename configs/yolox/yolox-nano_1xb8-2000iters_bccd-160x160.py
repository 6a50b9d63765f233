_base_ = '../yolo_lite/yolo-lite_1xb8-2000iters_bccd-160x160.py'
# mmdet's YOLOX-nano without mosaic and averaged weights, at the best learning rate of its study;
# mmdet's is 0.01.
norm_cfg = dict(type='BN', momentum=0.03, eps=0.001)
act_cfg = dict(type='Swish')
thin = dict(use_depthwise=True, norm_cfg=norm_cfg, act_cfg=act_cfg)
model = dict(
    _delete_=True,
    type='YOLOX',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        pad_size_divisor=32,
        batch_augments=_base_.model.data_preprocessor.batch_augments,
    ),
    backbone=dict(type='CSPDarknet', deepen_factor=0.33, widen_factor=0.25, **thin),
    neck=dict(
        type='YOLOXPAFPN', in_channels=[64, 128, 256], out_channels=64, num_csp_blocks=1, **thin
    ),
    bbox_head=dict(type='YOLOXHead', num_classes=3, in_channels=64, feat_channels=64, **thin),
    train_cfg=dict(assigner=dict(type='SimOTAAssigner', center_radius=2.5)),
    test_cfg=dict(score_thr=0.01, nms=dict(type='nms', iou_threshold=0.65)),
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.08, momentum=0.9, weight_decay=0.0005, nesterov=True),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
