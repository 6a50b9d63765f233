# Which blocks keep their gain in int8 on a network with norms? U-Net 8 on CamVid, at the learning
# rate that was best for compact and repvgg in camvid_unet.py;
# `tools/analysis_tools/study_int8.py` evaluates the checkpoints of these runs.
_base_ = 'camvid_unet.py'
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
    compact=dict(_base_.arms.compact, lr=0.1),
    repvgg_folded=dict(_base_.arms.repvgg_folded, lr=0.1),
    qarepvgg_folded=dict(config=_base_.config, cfg_options=qarepvgg, lr=0.1),
    dbb_folded=dict(_base_.arms.dbb_folded, lr=0.1),
)
