# Which blocks help mmsegmentation's Fast-SCNN? CamVid, quarter images. All 3x3 kernels are
# expanded, most of which are depthwise.
_base_ = 'camvid_unet.py'
lrs = [0.1, 0.3, 1.0]
seeds = [0, 1, 2, 3, 4]
tune_seeds = [0]
results_dir = '../../resources/studies/camvid_fastscnn'
config = '../fastscnn/fast_scnn_1xb8-1500iters_camvid-96x128.py'
expand = dict(type='ExpandHook', include='kernel:3x3', method='repvgg', forward='folded')
imports = dict(imports=['mmexpand'], allow_failed_imports=False)

arms = dict(
    _delete_=True,
    compact=dict(config=config),
    repvgg_folded=dict(
        config=config, cfg_options=dict(custom_hooks=[expand], custom_imports=imports)
    ),
)
