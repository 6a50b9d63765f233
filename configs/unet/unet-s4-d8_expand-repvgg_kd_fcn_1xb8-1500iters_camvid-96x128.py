_base_ = 'unet-s4-d8_expand-repvgg_fcn_1xb8-1500iters_camvid-96x128.py'
custom_hooks = [
    *_base_.custom_hooks,
    dict(
        type='DistillHook',
        teacher_config='{{ fileDirname }}/unet-s4-d8-c16_fcn_1xb8-1500iters_camvid-96x128.py',
        teacher_ckpt='work_dirs/unet-s4-d8-c16_fcn_1xb8-1500iters_camvid-96x128/iter_1500.pth',
        losses=dict(
            loss_kd=dict(
                type='KDLoss',
                tau=2.0,
                student='decode_head.conv_seg',
                teacher='decode_head.conv_seg',
            ),
        ),
    ),
]
