_base_ = 'yolo-lite_1xb8-2000iters_bccd-160x160.py'
# A teacher of twice the channels.
model = dict(
    backbone=dict(channels=(32, 64, 128, 256, 256)),
    bbox_head=dict(in_channels=256, feat_channels=512),
)
