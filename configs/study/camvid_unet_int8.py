# Which blocks keep their gain in int8 on a network with norms? U-Net 8 on CamVid;
# `tools/analysis_tools/study_int8.py` evaluates the checkpoints of these runs.
_base_ = 'camvid_unet.py'
lrs = [0.03, 0.1, 0.2, 0.4]
seeds = [0, 1, 2, 3, 4]
tune_seeds = [0]
results_dir = '../../resources/studies/camvid_unet_int8'

hook = dict(
    type='ExpandHook',
    include=[r're:backbone\..*conv$', 'decode_head.convs'],
    method='qarepvgg',
    forward='folded',
)
imports = dict(imports=['mmexpand'], allow_failed_imports=False)
qarepvgg = dict(custom_hooks=[hook], custom_imports=imports)
arms = dict(
    _delete_=True,
    compact=_base_.arms.compact,
    repvgg_folded=_base_.arms.repvgg_folded,
    qarepvgg_folded=dict(config=_base_.config, cfg_options=qarepvgg),
)
