# Does a block's gain add to a teacher's? YOLO-LITE on BCCD, alone and with bn, each with and
# without a teacher of twice the channels. The arms without one are bccd_yolo-lite.py's, and their
# results its results. Train the teacher first:
#   python tools/train.py configs/yolo_lite/yolo-lite-w2_expand-bn_1xb8-2000iters_bccd-160x160.py \
#       --cfg-options randomness.seed=0
_base_ = [
    'bccd_yolo-lite.py',
    '../yolo_lite/yolo-lite_expand-bn_kd-hint_1xb8-2000iters_bccd-160x160.py',
]
seeds = [0, 1, 2]
# The config's path of the teacher depends on the machine.
teacher = 'configs/yolo_lite/yolo-lite-w2_1xb8-2000iters_bccd-160x160.py'
distill = dict(_base_.custom_hooks[-1], teacher_config=teacher)


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
