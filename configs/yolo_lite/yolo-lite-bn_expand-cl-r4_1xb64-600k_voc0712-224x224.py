_base_ = 'yolo-lite-bn_1xb64-600k_voc0712-224x224.py'
custom_hooks = [
    dict(type='NumClassCheckHook'),
    dict(type='ExpandHook', include='backbone', method='cl', rate=4),
    dict(type='ContractHook'),
]
