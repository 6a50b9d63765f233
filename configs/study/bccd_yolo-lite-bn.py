# Table 4's question on a network that trains: YOLO-LITE with batch norms on BCCD. A chain without a
# norm behind it does not train from the paper's start (docs/paper.md).
_base_ = 'bccd_yolo-lite.py'
lrs = [0.003, 0.01, 0.03]
seeds = [0, 1, 2]
results_dir = '../../resources/studies/bccd_yolo-lite-bn'
config = '../yolo_lite/yolo-lite-bn_1xb8-2000iters_bccd-160x160.py'


def arm(**fields):
    hooks = [
        dict(type='NumClassCheckHook'),
        dict(type='ExpandHook', include='backbone', **fields),
    ]
    return dict(config=config, cfg_options=dict(_base_.short, custom_hooks=hooks))


arms = dict(
    _delete_=True,
    compact=dict(config=config, cfg_options=_base_.short),
    cl=arm(method='cl', rate=4),
    repvgg=arm(method='repvgg'),
)
