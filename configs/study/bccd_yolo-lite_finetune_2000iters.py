# bccd_yolo-lite_finetune.py for twice as many iterations.
_base_ = 'bccd_yolo-lite_finetune.py'
seeds = [0, 1, 2]
results_dir = '../../resources/studies/bccd_yolo-lite_finetune_2000iters'
kept = ('compact', 'bn', 'repvgg_folded', 'dbb_folded')


def longer(arm):
    hooks = {name: arm.cfg_options[name] for name in arm.cfg_options if name == 'custom_hooks'}
    return dict(arm, cfg_options=dict(hooks, load_from=_base_.given.load_from))


arms = dict(_delete_=True, **{name: longer(_base_.arms[name]) for name in kept})
