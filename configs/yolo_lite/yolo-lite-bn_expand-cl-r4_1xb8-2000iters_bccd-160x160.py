_base_ = 'yolo-lite-bn_1xb8-2000iters_bccd-160x160.py'
custom_hooks = [
    dict(type='NumClassCheckHook'),
    dict(type='ExpandHook', include='backbone', method='cl', rate=4),
    dict(type='ContractHook'),
]
