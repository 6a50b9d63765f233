# training schedule: darknet's `max_batches=600200 policy=steps`
train_cfg = dict(type='IterBasedTrainLoop', max_iters=600200, val_interval=10000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# learning rate
# Darknet's `burn_in=1000` is a factor (n / 1000) ** 4 on the n-th batch. Schedulers multiply, so
# four linear ones from 1 / 1000 to 1 are exactly that.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=False, milestones=[400000, 450000], gamma=0.1),
]

# optimizer; darknet does not decay biases
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.001, momentum=0.9, weight_decay=0.0005),
    paramwise_cfg=dict(bias_decay_mult=0.0),
)

# NOTE: `auto_scale_lr` is for automatically scaling LR,
# USER SHOULD NOT CHANGE ITS VALUES.
# base_batch_size = (1 GPU) x (64 samples per GPU)
auto_scale_lr = dict(enable=False, base_batch_size=64)
