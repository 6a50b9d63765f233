# model settings
# Darknet feeds RGB in [0, 1].
data_preprocessor = dict(
    type='DetDataPreprocessor',
    mean=[0, 0, 0],
    std=[255.0, 255.0, 255.0],
    bgr_to_rgb=True,
    pad_size_divisor=32,
    # Multi-scale training as darknet's `random=1`: every 10 batches another multiple of 32.
    # Darknet draws from 320 to 608 for a network of 416; the same ratios (0.77 to 1.46) of 224
    # are 172 to 327, so 160 to 320 in multiples of 32.
    batch_augments=[
        dict(
            type='BatchSyncRandomResize',
            random_size_range=(160, 320),
            interval=10,
            size_divisor=32,
        )
    ],
)
model = dict(
    type='SingleStageDetector',
    data_preprocessor=data_preprocessor,
    backbone=dict(type='YOLOLite'),
    bbox_head=dict(
        type='YOLOV2Head',
        num_classes=20,
        in_channels=128,
        feat_channels=256,
        # The anchors in pixels; in cells of 32 pixels they are
        # (1.08, 1.19), (3.42, 4.41), (6.63, 11.38), (9.42, 5.11), (16.62, 10.52).
        anchor_generator=dict(
            type='YOLOAnchorGenerator',
            base_sizes=[
                [
                    (34.56, 38.08),
                    (109.44, 141.12),
                    (212.16, 364.16),
                    (301.44, 163.52),
                    (531.84, 336.64),
                ]
            ],
            strides=[32],
        ),
        object_scale=5.0,
        noobject_scale=1.0,
        coord_scale=1.0,
        class_scale=1.0,
        noobj_iou_thr=0.5,
        # Darknet pulls boxes to their anchors for the first 12800 images: 200 batches of 64.
        anchor_warmup_iters=200,
    ),
    # training and testing settings
    train_cfg=dict(),
    test_cfg=dict(
        nms_pre=1000,
        score_thr=0.005,
        nms=dict(type='nms', iou_threshold=0.45),
        max_per_img=200,
    ),
)
