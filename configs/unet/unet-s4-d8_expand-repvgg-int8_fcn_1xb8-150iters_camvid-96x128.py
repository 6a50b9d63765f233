_base_ = 'unet-s4-d8_expand-repvgg_fcn_1xb8-1500iters_camvid-96x128.py'
# The trained network goes on for a tenth of its iterations, with the rounding of int8, at a
# hundredth of its learning rate: at a tenth three runs lost 0.3 to 1.7 mIoU.
load_from = 'work_dirs/unet-s4-d8_expand-repvgg_fcn_1xb8-1500iters_camvid-96x128/iter_1500.pth'
custom_hooks = [*_base_.custom_hooks, dict(type='QuantHook')]
train_cfg = dict(max_iters=150, val_interval=150)
param_scheduler = [
    dict(type='CosineAnnealingLR', T_max=150, by_epoch=False),
]
optim_wrapper = dict(optimizer=dict(lr=0.001))
default_hooks = dict(checkpoint=dict(interval=150))
