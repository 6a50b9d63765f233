_base_ = 'yolo-lite_1xb8-2000iters_bccd-160x160.py'
custom_hooks = [
    dict(type='NumClassCheckHook'),
    dict(type='ExpandHook', include='backbone', method='bn', forward='layerwise'),
    dict(type='ContractHook'),
]
# The best of four for it; the compact network's is 0.001.
optim_wrapper = dict(optimizer=dict(lr=0.01))
