# Which blocks help a detector without norms that starts from given weights? YOLO-LITE from its
# authors' weights of VOC on BCCD. `tools/model_converters/darknet2mmdet.py` writes load_from; the
# last layer, which has other classes there, starts as without it.
_base_ = 'bccd_yolo-lite.py'
# Of the pilot's grid: every arm has its own best rate.
lrs = [0.01, 0.016, 0.02]
seeds = [0, 1, 2, 3, 4]
results_dir = '../../resources/studies/bccd_yolo-lite_finetune'
given = dict(_base_.short, load_from='work_dirs/yolo_lite_voc.pth')


def finetuned(lr, **fields):
    options = dict(given)
    if fields:
        options['custom_hooks'] = [
            dict(type='NumClassCheckHook'),
            dict(type='ExpandHook', include='backbone', init='preserve', **fields),
        ]
    return dict(config=_base_.config, cfg_options=options, lr=lr)


arms = dict(
    _delete_=True,
    compact=finetuned(0.016),
    bn=finetuned(0.02, method='bn', forward='layerwise'),
    qarepvgg=finetuned(0.02, method='qarepvgg', forward='layerwise'),
    repvgg_folded=finetuned(0.01, method='repvgg', forward='folded'),
    dbb_folded=finetuned(0.01, method='dbb', forward='folded'),
    do=finetuned(0.016, method='do'),
    cl=finetuned(0.004, method='cl', rate=4),
)
