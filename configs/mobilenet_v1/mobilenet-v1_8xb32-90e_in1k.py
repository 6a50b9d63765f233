# MobileNet in the paper's training (Sec. 4.1.2). mmpretrain has none: it is timm's, which
# mmpretrain wraps; needs both.
_base_ = '../mobilenet_v2/mobilenet-v2_8xb32-90e_in1k.py'
model = dict(
    backbone=dict(_delete_=True, type='TIMMBackbone', model_name='mobilenetv1_100'),
    head=dict(in_channels=1024),
)
