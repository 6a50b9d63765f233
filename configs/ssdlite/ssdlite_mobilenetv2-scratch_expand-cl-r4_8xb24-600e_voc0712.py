_base_ = 'ssdlite_mobilenetv2-scratch_8xb24-600e_voc0712.py'
custom_imports = dict(imports=['mmexpand'], allow_failed_imports=False)
custom_hooks = [
    *_base_.custom_hooks,
    # Sec. 4.1.2 of the paper, of MobileNetV2: "the non-residual 3x3 convolutional layers".
    dict(
        type='ExpandHook',
        include='kernel:3x3',
        exclude=['kind:residual', 'neck', 'bbox_head'],
        method='cl',
        rate=4,
        init='preserve',
    ),
    dict(type='ContractHook'),
]
