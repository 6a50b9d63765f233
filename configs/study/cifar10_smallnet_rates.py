# Table 9: is it the rate? CK with r from 0.25 to 8, each at its own best learning rate. The compact
# network and r = 4 are cifar10_smallnet.py's arms, and their results its results.
_base_ = 'cifar10_smallnet.py'


def rate(r):
    hook = dict(type='ExpandHook', include='features', method='ck', rate=r)
    return dict(config=_base_.config, cfg_options=dict(_base_.tuned, custom_hooks=[hook]))


arms = dict(
    _delete_=True,
    compact=_base_.arms.compact,
    ck_r025=rate(0.25),
    ck_r05=rate(0.5),
    ck_r075=rate(0.75),
    ck_r1=rate(1),
    ck_r2=rate(2),
    ck=_base_.arms.ck,
    ck_r8=rate(8),
)
