# mmpretrain's ShuffleNetV2 at half its width, as in the paper (Sec. 4.1.2); needs mmpretrain.
_base_ = 'mmpretrain::shufflenet_v2/shufflenet-v2-1x_16xb64_in1k.py'
model = dict(backbone=dict(widen_factor=0.5))
