# camvid_unet_finetune.py on all 204 images of the third sequence.
_base_ = 'camvid_unet_finetune.py'
results_dir = '../../resources/studies/camvid_unet_finetune_204images'
images = {'train_dataloader.dataset.indices': list(range(204))}


def on_images(arm):
    return dict(arm, cfg_options=dict(arm.cfg_options, **images))


arms = dict(
    _delete_=True,
    compact=on_images(_base_.arms.compact),
    repvgg_folded=on_images(_base_.arms.repvgg_folded),
)
