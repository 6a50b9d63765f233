_base_ = 'yolo-lite_expand-bn_1xb8-2000iters_bccd-160x160.py'
custom_hooks = [
    *_base_.custom_hooks,
    dict(
        type='DistillHook',
        teacher_config='{{ fileDirname }}/yolo-lite-w2_1xb8-2000iters_bccd-160x160.py',
        teacher_ckpt='work_dirs/yolo-lite-w2_expand-bn_1xb8-2000iters_bccd-160x160/'
        'compact_last.pth',
        losses=dict(
            # Class scores at every cell and anchor.
            loss_kd=dict(
                type='KDLoss',
                tau=2.0,
                num_anchors=5,
                num_classes=3,
                student='bbox_head.convs.1',
                teacher='bbox_head.convs.1',
            ),
            loss_hint=dict(
                type='HintLoss',
                in_channels=128,
                out_channels=256,
                student='backbone.convs.4',
                teacher='backbone.convs.4',
            ),
        ),
    ),
]
