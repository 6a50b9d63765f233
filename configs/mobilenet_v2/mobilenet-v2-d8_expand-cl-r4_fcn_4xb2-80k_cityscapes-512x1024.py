_base_ = 'mmseg::mobilenet_v2/mobilenet-v2-d8_fcn_4xb2-80k_cityscapes-512x1024.py'
custom_imports = dict(imports=['mmexpand'], allow_failed_imports=False)
custom_hooks = [
    # Sec. 4.1.2 of the paper, of MobileNetV2: "the non-residual 3x3 convolutional layers".
    dict(
        type='ExpandHook',
        include='kernel:3x3',
        exclude=['kind:residual', 'decode_head', 'auxiliary_head'],
        method='cl',
        rate=4,
    ),
    dict(type='ContractHook'),
]
