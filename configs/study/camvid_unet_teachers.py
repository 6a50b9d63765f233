# Does a block's gain add to a teacher's? U-Net 8 on CamVid, alone and with repvgg, each with and
# without a teacher of twice the channels. The arms without one are camvid_unet_int8.py's, and
# their results its results. Train the teacher first:
#   python tools/train.py configs/unet/unet-s4-d8-c16_fcn_1xb8-1500iters_camvid-96x128.py \
#       --cfg-options randomness.seed=0
_base_ = [
    'camvid_unet_int8.py',
    '../unet/unet-s4-d8_expand-repvgg_kd_fcn_1xb8-1500iters_camvid-96x128.py',
]
lrs = [0.03, 0.1]
tune_seeds = [0]
seeds = [0, 1, 2]
# The config's path of the teacher depends on the machine.
teacher = 'configs/unet/unet-s4-d8-c16_fcn_1xb8-1500iters_camvid-96x128.py'
distill = dict(_base_.custom_hooks[-1], teacher_config=teacher)


def taught(arm):
    options = arm.get('cfg_options', {})
    hooks = [*options.get('custom_hooks', []), distill]
    options = dict(options, custom_hooks=hooks, custom_imports=_base_.custom_imports)
    return dict(config=arm.config, cfg_options=options)


plain = _base_.arms
arms = dict(
    _delete_=True,
    compact=plain.compact,
    repvgg_folded=plain.repvgg_folded,
    compact_kd=taught(plain.compact),
    repvgg_folded_kd=taught(plain.repvgg_folded),
)
