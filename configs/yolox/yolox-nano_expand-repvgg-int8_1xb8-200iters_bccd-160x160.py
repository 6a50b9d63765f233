_base_ = 'yolox-nano_expand-repvgg_1xb8-2000iters_bccd-160x160.py'
# A tenth of the iterations at a hundredth of the learning rate, with the rounding of int8.
load_from = 'work_dirs/yolox-nano_expand-repvgg_1xb8-2000iters_bccd-160x160/iter_2000.pth'
custom_hooks = [*_base_.custom_hooks[:2], dict(type='QuantHook'), dict(type='ContractHook')]
optim_wrapper = dict(optimizer=dict(lr=0.0002))
train_cfg = dict(max_iters=200, val_interval=200)
param_scheduler = [dict(type='CosineAnnealingLR', T_max=200, by_epoch=False)]
default_hooks = dict(checkpoint=dict(interval=200))
