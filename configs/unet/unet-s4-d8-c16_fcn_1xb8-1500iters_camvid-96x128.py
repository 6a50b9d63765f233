_base_ = 'unet-s4-d8_fcn_1xb8-1500iters_camvid-96x128.py'
# A teacher of twice the channels.
model = dict(
    backbone=dict(base_channels=16),
    decode_head=dict(in_channels=16, channels=16),
)
