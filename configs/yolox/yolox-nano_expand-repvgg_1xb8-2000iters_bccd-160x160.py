_base_ = 'yolox-nano_1xb8-2000iters_bccd-160x160.py'
custom_hooks = [
    dict(type='NumClassCheckHook'),
    dict(type='ExpandHook', method='repvgg', forward='folded'),
    dict(type='ContractHook'),
]
# The best of three for it; the compact network's is 0.08.
optim_wrapper = dict(optimizer=dict(lr=0.02))
