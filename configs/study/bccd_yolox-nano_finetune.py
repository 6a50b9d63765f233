# Do blocks with norms help a stock detector with norms that starts from given weights? YOLOX-nano,
# trained on drawn images, fine-tuned on BCCD for 1,000 iterations. First train the given network;
# its classification layers have other classes and are skipped:
#   python tools/demo/draw_voc.py data/drawn_voc --num-train 1600
#   python tools/train.py configs/yolox/yolox-nano_1xb8-2000iters_drawn-voc-160x160.py \
#       --cfg-options randomness.seed=0
_base_ = 'bccd_yolo-lite.py'
lrs = [0.02, 0.04, 0.08, 0.16, 0.32]
seeds = [0, 1, 2]
results_dir = '../../resources/studies/bccd_yolox-nano_finetune'
config = '../yolox/yolox-nano_1xb8-2000iters_bccd-160x160.py'
given = dict(
    _base_.short, load_from='work_dirs/yolox-nano_1xb8-2000iters_drawn-voc-160x160/iter_2000.pth'
)
hooks = [
    dict(type='NumClassCheckHook'),
    dict(type='ExpandHook', method='repvgg', forward='folded'),  # The 3x3 kernels.
]

arms = dict(
    _delete_=True,
    nothing=dict(config=config, cfg_options=_base_.short),  # The given weights' own gain.
    compact=dict(config=config, cfg_options=given),
    repvgg_folded=dict(config=config, cfg_options=dict(given, custom_hooks=hooks)),
)
