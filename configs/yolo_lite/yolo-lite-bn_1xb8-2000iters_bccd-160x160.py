_base_ = 'yolo-lite_1xb8-2000iters_bccd-160x160.py'
model = dict(backbone=dict(norm_cfg=dict(type='BN')))
# The best of its study.
optim_wrapper = dict(optimizer=dict(lr=0.01))
