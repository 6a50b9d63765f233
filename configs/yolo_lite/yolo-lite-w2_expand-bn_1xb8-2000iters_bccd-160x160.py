_base_ = 'yolo-lite_expand-bn_1xb8-2000iters_bccd-160x160.py'
# Trains the teacher better than without norms; contracts to yolo-lite-w2.
model = dict(
    backbone=dict(channels=(32, 64, 128, 256, 256)),
    bbox_head=dict(in_channels=256, feat_channels=512),
)
