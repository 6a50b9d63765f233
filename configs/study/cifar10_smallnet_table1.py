# Table 1 without a teacher, in 15 epochs: the paper's blocks and ACNet, each at its own best
# learning rate. The compact network, CL and CK are cifar10_smallnet.py's arms, and their
# results its results.
_base_ = 'cifar10_smallnet.py'


def expand(method, include='features', **fields):
    hook = dict(type='ExpandHook', include=include, method=method, **fields)
    return dict(config=_base_.config, cfg_options=dict(_base_.tuned, custom_hooks=[hook]))


linear = ['features', 'classifier.0']  # The first of the two linear layers, as in the paper.
arms = dict(
    _delete_=True,
    compact=_base_.arms.compact,
    fc=expand('fc', include='classifier.0', rate=4),
    cl=_base_.arms.cl,
    cl_fc=expand('cl+fc', include=linear, rate=4),
    ck=_base_.arms.ck,
    ck_fc=expand('ck+fc', include=linear, rate=4),
    acnet=expand('acnet'),
)
