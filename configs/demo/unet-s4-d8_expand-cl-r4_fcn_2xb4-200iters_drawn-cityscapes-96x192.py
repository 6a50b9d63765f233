_base_ = 'unet-s4-d8_fcn_2xb4-200iters_drawn-cityscapes-96x192.py'
custom_imports = dict(imports=['mmexpand'], allow_failed_imports=False)
custom_hooks = [
    dict(type='ExpandHook', include='backbone.encoder', method='cl', rate=4),
    dict(type='ContractHook', evaluate_expanded=True, report=True),
]
