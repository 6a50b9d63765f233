_base_ = [
    '../_base_/models/yolo_lite.py',
    '../_base_/datasets/voc0712_yolo.py',
    '../_base_/schedules/schedule_yolo_600k.py',
    'mmdet::_base_/default_runtime.py',
]
# YOLOLite and YOLOV2Head are ours.
custom_imports = dict(imports=['mmexpand'], allow_failed_imports=False)
custom_hooks = [dict(type='NumClassCheckHook')]

default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=10000, max_keep_ckpts=3, save_best='pascal_voc/mAP'),
    logger=dict(log_metric_by_epoch=False),
)
log_processor = dict(by_epoch=False)
