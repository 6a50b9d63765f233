# bccd_yolo-lite_finetune.py for twice as long.
_base_ = 'bccd_yolo-lite_finetune.py'
results_dir = '../../resources/studies/bccd_yolo-lite_finetune_2000iters'


def longer(arm):
    # The config's own schedule has 2,000 iterations.
    options = {key: value for key, value in arm.cfg_options.items() if key not in _base_.short}
    return dict(arm, cfg_options=options)


arms = dict(_delete_=True, compact=longer(_base_.arms.compact), bn=longer(_base_.arms.bn))
