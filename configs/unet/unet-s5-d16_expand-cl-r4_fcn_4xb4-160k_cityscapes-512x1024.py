_base_ = 'unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py'
custom_imports = dict(imports=['mmexpand'], allow_failed_imports=False)
custom_hooks = [
    dict(type='ExpandHook', include='backbone.encoder', method='cl', rate=4),
    dict(type='ContractHook'),
]
