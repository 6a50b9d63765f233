_base_ = 'fast_scnn_1xb8-1500iters_camvid-96x128.py'
custom_imports = dict(imports=['mmexpand'], allow_failed_imports=False)
custom_hooks = [
    dict(type='ExpandHook', include='kernel:3x3', method='repvgg', forward='folded'),
    dict(type='ContractHook'),
]
