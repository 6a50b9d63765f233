_base_ = 'yolo-lite_expand-bn_1xb8-2000iters_bccd-160x160.py'
# The trained network goes on for a tenth of its iterations, with the rounding of int8, at a
# hundredth of its learning rate, as U-Net's.
load_from = 'work_dirs/yolo-lite_expand-bn_1xb8-2000iters_bccd-160x160/iter_2000.pth'
custom_hooks = [*_base_.custom_hooks, dict(type='QuantHook')]
model = dict(bbox_head=dict(anchor_warmup_iters=0))
train_cfg = dict(max_iters=200, val_interval=200)
param_scheduler = [dict(type='CosineAnnealingLR', T_max=200, by_epoch=False)]
optim_wrapper = dict(optimizer=dict(lr=0.0001))
default_hooks = dict(checkpoint=dict(interval=200))
