_base_ = '../unet/unet-s4-d8_fcn_1xb8-1500iters_camvid-96x128.py'
# mmsegmentation's Fast-SCNN with the data and schedule of the U-Net: minutes on a CPU.
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    backbone=dict(
        _delete_=True,
        type='FastSCNN',
        downsample_dw_channels=(32, 48),
        global_in_channels=64,
        global_block_channels=(64, 96, 128),
        global_block_strides=(2, 2, 1),
        global_out_channels=128,
        higher_in_channels=64,
        lower_in_channels=128,
        fusion_out_channels=128,
        out_indices=(0, 1, 2),
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        type='DepthwiseSeparableFCNHead',
        in_channels=128,
        channels=128,
        in_index=-1,
        norm_cfg=norm_cfg,
    ),
)
optim_wrapper = dict(optimizer=dict(lr=0.3))  # The best of three.
