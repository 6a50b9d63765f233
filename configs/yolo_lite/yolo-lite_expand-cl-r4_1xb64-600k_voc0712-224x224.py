_base_ = 'yolo-lite_1xb64-600k_voc0712-224x224.py'
custom_hooks = [
    dict(type='NumClassCheckHook'),
    # Without normalisation the start matters: the backbone's Kaiming initialisation, applied to
    # each of the three factors of a layer (`init='default'`), multiplies the features' scale by
    # 2 a layer, and training diverges. 'preserve' starts as the same function as the compact one.
    dict(type='ExpandHook', include='backbone', method='cl', rate=4, init='preserve'),
    dict(type='ContractHook'),
]
