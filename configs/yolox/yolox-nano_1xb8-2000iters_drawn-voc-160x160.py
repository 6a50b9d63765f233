_base_ = 'yolox-nano_1xb8-2000iters_bccd-160x160.py'
# Weights to fine-tune from where no real data set is at hand: images that tools/demo/draw_voc.py
# draws, with six of VOC's classes.
data = dict(
    data_root='data/drawn_voc/',
    metainfo=dict(classes=('boat', 'bottle', 'car', 'person', 'pottedplant', 'tvmonitor')),
)
model = dict(bbox_head=dict(num_classes=6))
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = dict(dataset=data)
