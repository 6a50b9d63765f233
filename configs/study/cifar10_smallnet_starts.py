# Table 8: is it the start or the training? The compact network from a contracted, untrained CK
# network, and CK from its trained nonlinear counterpart, in the authors' setting. The weights come
# from (the second is an arm of this study, so it goes first):
#   python tools/train.py configs/smallnet/smallnet-k7_expand-ck-r4_1xb128-150e_cifar10.py \
#       --work-dir work_dirs/smallnet-k7_expand-ck-r4_untrained --cfg-options \
#       train_cfg.max_epochs=0 param_scheduler=None randomness.seed=0
#   python -m mmexpand.study configs/study/cifar10_smallnet_starts.py ck_nonlinear 0.01 0
_base_ = 'cifar10_smallnet.py'
baseline = 'compact_authors'
seeds = [0, 1, 2]
untrained = 'work_dirs/smallnet-k7_expand-ck-r4_untrained/compact_last.pth'
nonlinear = 'work_dirs/cifar10_smallnet_starts/ck_nonlinear/lr0.01_seed0/epoch_15.pth'


def arm(load_from=None, **fields):
    options = dict(_base_.authors)
    if load_from:
        options['load_from'] = load_from
    if fields:
        options['custom_hooks'] = [dict(type='ExpandHook', include='features', rate=4, **fields)]
    return dict(config=_base_.config, cfg_options=options, lr=0.01)


arms = dict(
    _delete_=True,
    compact_authors=_base_.arms.compact_authors,
    compact_from_ck=arm(untrained),
    ck_authors=_base_.arms.ck_authors,
    ck_nonlinear=arm(method='ck', nonlinear='relu'),
    ck_from_nonlinear=arm(nonlinear, method='ck'),
)
