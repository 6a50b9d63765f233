_base_ = 'unet-s4-d8_fcn_1xb8-1500iters_camvid-96x128.py'
# A teacher of four times the channels.
model = dict(
    backbone=dict(base_channels=32),
    decode_head=dict(in_channels=32, channels=32),
)
