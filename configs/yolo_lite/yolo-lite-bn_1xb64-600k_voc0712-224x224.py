_base_ = 'yolo-lite_1xb64-600k_voc0712-224x224.py'
model = dict(backbone=dict(norm_cfg=dict(type='BN')))
