_base_ = 'mobilenet-v1_8xb32-90e_in1k.py'
custom_imports = dict(imports=['mmexpand'], allow_failed_imports=False)
custom_hooks = [
    # Sec. 4.1.2: "all convolutional layers with kernel size 3x3".
    dict(type='ExpandHook', include='kernel:3x3', method='cl', rate=4),
    dict(type='ContractHook'),
]
