# Does the paper's recipe for U-Net (SGD at 1e-8 on losses that are summed over the pixels) train?
# U-Net of 16 channels on CamVid, the rate scaled to the pixels of a batch: the loss must fall.
baseline = 'compact'
metric = 'mIoU'
seeds = [0]
tune_seeds = [0]
results_dir = '../../resources/studies/camvid_unet_ce-sum'
channels_last = True

crop_size = (96, 128)
batch_size = 4
# The recipe's batches are four crops of 512x1024.
lr = 1e-8 * (4 * 512 * 1024) / (batch_size * crop_size[0] * crop_size[1])
lrs = [lr]
options = {
    'train_cfg.max_iters': 300,
    'train_cfg.val_interval': 300,
    'default_hooks.checkpoint': dict(
        _delete_=True, type='CheckpointHook', by_epoch=False, interval=100, max_keep_ckpts=1
    ),
    'model.backbone.base_channels': 16,
    'model.backbone.norm_cfg.type': 'BN',
    'model.decode_head.in_channels': 16,
    'model.decode_head.channels': 16,
    'model.decode_head.norm_cfg.type': 'BN',
    'model.data_preprocessor.size': crop_size,
    'train_dataloader.batch_size': batch_size,
    'train_dataloader.dataset.pipeline.2.scale': (240, 176),
    'train_dataloader.dataset.pipeline.3.crop_size': crop_size,
}
for split in ('train', 'val', 'test'):
    options[f'{split}_dataloader.dataset.data_root'] = 'data/camvid/'
    options[f'{split}_dataloader.num_workers'] = 0
    options[f'{split}_dataloader.persistent_workers'] = False
for split in ('val', 'test'):
    options[f'{split}_dataloader.dataset.pipeline.1.scale'] = (240, 176)
test = dict(img_path='leftImg8bit/test', seg_map_path='gtFine/test')
options['test_dataloader.dataset.data_prefix'] = test
path = '../unet/unet-s5-d16_{}fcn-ce-sum_4xb4-160k_cityscapes-512x1024.py'
arms = dict(
    compact=dict(config=path.format(''), cfg_options=options, lr=lr),
    cl=dict(config=path.format('expand-cl-r4_'), cfg_options=options, lr=lr),
)
