_base_ = 'shufflenet-v2-0.5x_16xb64_in1k.py'
custom_imports = dict(imports=['mmexpand'], allow_failed_imports=False)
custom_hooks = [
    # Sec. 4.1.2: "all convolutional layers with kernel size 3x3".
    dict(type='ExpandHook', include='kernel:3x3', method='cl', rate=4),
    dict(type='ContractHook'),
]
