# Table 1 with a teacher, in 15 epochs: CK and CL at the learning rate that was best without a
# teacher, the compact network at the better of two.
# The paper's teacher, ResNet18, requires a GPU; this one is a wide SmallNet. Train it first:
#   python tools/train.py configs/smallnet/smallnet-k3-w4_1xb128-15e_cifar10.py \
#       --cfg-options randomness.seed=0
_base_ = 'cifar10_smallnet_table1.py'
lrs = [0.01, 0.1]
seeds = [0, 1, 2]

teacher = 'smallnet-k3-w4_1xb128-15e_cifar10'
losses = dict(
    kd=dict(type='KDLoss', tau=4.0, student='classifier', teacher='classifier'),
    hint=dict(
        type='HintLoss', in_channels=32, out_channels=128, student='features', teacher='features'
    ),
    pkt=dict(type='PKTLoss', student='classifier.1', teacher='classifier.1'),
)


def taught(loss, arm):
    hook = dict(
        type='DistillHook',
        teacher_config=f'configs/smallnet/{teacher}.py',
        teacher_ckpt=f'work_dirs/{teacher}/epoch_15.pth',
        losses={f'loss_{loss}': losses[loss]},
    )
    hooks = [*arm.cfg_options.get('custom_hooks', []), hook]
    return dict(arm, cfg_options=dict(arm.cfg_options, custom_hooks=hooks))


plain = _base_.arms
arms = dict(
    _delete_=True,
    compact=dict(plain.compact, lr=0.1),
    cl_fc=dict(plain.cl_fc, lr=0.01),
    ck_fc=dict(plain.ck_fc, lr=0.01),
    compact_kd=taught('kd', plain.compact),
    cl_fc_kd=dict(taught('kd', plain.cl_fc), lr=0.01),
    ck_fc_kd=dict(taught('kd', plain.ck_fc), lr=0.01),
    ck_fc_hint=dict(taught('hint', plain.ck_fc), lr=0.01),
    ck_fc_pkt=dict(taught('pkt', plain.ck_fc), lr=0.01),
)
