# What do RepVGG's branches add to one norm behind each layer? The same arms and results, against
# `bn`. `tools/study.py THIS --report-only`
_base_ = 'bccd_yolo-lite.py'
baseline = 'bn'
