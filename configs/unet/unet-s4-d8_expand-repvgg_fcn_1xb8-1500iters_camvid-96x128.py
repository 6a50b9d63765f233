_base_ = 'unet-s4-d8_fcn_1xb8-1500iters_camvid-96x128.py'
custom_imports = dict(imports=['mmexpand'], allow_failed_imports=False)
custom_hooks = [
    dict(
        type='ExpandHook',
        include=[r're:backbone\..*conv$', 'decode_head.convs'],
        method='repvgg',
        forward='folded',
    ),
    dict(type='ContractHook'),
]
