_base_ = 'mmseg::unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py'
# U-Net halves the image four times: images of any size are padded for it.
data_preprocessor = dict(test_cfg=dict(size_divisor=16))
model = dict(data_preprocessor=data_preprocessor)
# mRecall and mPrecision come with mFscore.
val_evaluator = dict(iou_metrics=['mIoU', 'mFscore'])
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best='mIoU', max_keep_ckpts=3))
