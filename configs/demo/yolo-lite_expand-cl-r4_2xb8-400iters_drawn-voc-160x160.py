_base_ = 'yolo-lite_2xb8-400iters_drawn-voc-160x160.py'
custom_hooks = [
    dict(type='NumClassCheckHook'),
    dict(type='ExpandHook', include='backbone', method='cl', rate=4, init='preserve'),
    dict(type='ContractHook', evaluate_expanded=True, report=True),
]
