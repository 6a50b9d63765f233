# Which blocks help a segmentor with norms that starts from given weights? U-Net 8, trained on two
# sequences of CamVid, fine-tuned on 102 images of the third. First train the given network, on the
# 163 images of the first two sequences by name:
#   python tools/train.py configs/unet/unet-s4-d8_fcn_1xb8-1500iters_camvid-96x128.py \
#       --work-dir work_dirs/unet_camvid_two-sequences --cfg-options randomness.seed=0 \
#       train_dataloader.dataset.indices=163
_base_ = 'camvid_unet.py'
lrs = [0.03, 0.1, 0.2]
seeds = [0, 1, 2]
tune_seeds = [0]
results_dir = '../../resources/studies/camvid_unet_finetune'

given = {
    'load_from': 'work_dirs/unet_camvid_two-sequences/iter_1500.pth',
    'train_dataloader.dataset.data_prefix': dict(
        img_path='leftImg8bit/train/0016e5', seg_map_path='gtFine/train/0016e5'
    ),
    # Every second image: neighbours are alike.
    'train_dataloader.dataset.indices': list(range(0, 204, 2)),
    'train_cfg.max_iters': 600,
    'param_scheduler': [dict(type='CosineAnnealingLR', T_max=600, by_epoch=False)],
}


def finetuned(**fields):
    hook = dict(_base_.arms.repvgg_folded.cfg_options.custom_hooks[0], **fields)
    imports = dict(imports=['mmexpand'], allow_failed_imports=False)
    return dict(
        config=_base_.config, cfg_options=dict(given, custom_hooks=[hook], custom_imports=imports)
    )


arms = dict(
    _delete_=True,
    compact=dict(config=_base_.config, cfg_options=given),
    repvgg_folded=finetuned(method='repvgg'),
    qarepvgg_folded=finetuned(method='qarepvgg'),
)
