# Does a block's gain add to a teacher's? YOLO-LITE on BCCD, alone and with bn, each with and
# without a teacher of twice the channels. The arms without one are bccd_yolo-lite.py's, and their
# results its results. Train the teacher first:
#   python tools/train.py configs/yolo_lite/yolo-lite-w2_expand-bn_1xb8-2000iters_bccd-160x160.py \
#       --cfg-options randomness.seed=0
_base_ = 'bccd_yolo-lite.py'
seeds = [0, 1, 2]
teacher = 'configs/yolo_lite/yolo-lite-w2_1xb8-2000iters_bccd-160x160.py'
distill = dict(
    type='DistillHook',
    teacher_config=teacher,
    teacher_ckpt='work_dirs/yolo-lite-w2_expand-bn_1xb8-2000iters_bccd-160x160/compact_last.pth',
    losses=dict(
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
)


def taught(arm):
    options = arm.get('cfg_options', {})
    hooks = [*options.get('custom_hooks', [dict(type='NumClassCheckHook')]), distill]
    return dict(arm, cfg_options=dict(options, custom_hooks=hooks))


plain = _base_.arms
arms = dict(
    _delete_=True,
    compact=plain.compact,
    bn=plain.bn,
    compact_kd=taught(plain.compact),
    bn_kd=taught(plain.bn),
)
