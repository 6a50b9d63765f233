_base_ = 'mobilenet-v2_8xb32-90e_in1k.py'
custom_imports = dict(imports=['mmexpand'], allow_failed_imports=False)
custom_hooks = [
    # Sec. 4.1.2: "only expanding the non-residual 3x3 convolutional layers in MobileNetV2".
    dict(type='ExpandHook', include='kernel:3x3', exclude='kind:residual', method='cl', rate=4),
    dict(type='ContractHook'),
]
