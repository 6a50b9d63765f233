_base_ = 'smallnet-k7_1xb128-15e_cifar10-first5.py'
# Fine-tuning: the other five classes, 200 training images of each.
metainfo = dict(classes=('dog', 'frog', 'horse', 'ship', 'truck'))
max_epochs = 40
train_dataloader = dict(
    batch_size=50,
    # Every 22nd to 23rd of 22,500 images, which are in the order of their classes.
    dataset=dict(metainfo=metainfo, indices=[22500 * i // 1000 for i in range(1000)]),
)
val_dataloader = dict(dataset=dict(metainfo=metainfo))
test_dataloader = dict(dataset=dict(metainfo=metainfo))
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, convert_to_iter_based=True)
]
default_hooks = dict(checkpoint=dict(interval=max_epochs))
load_from = 'work_dirs/smallnet-k7_1xb128-15e_cifar10-first5/epoch_15.pth'
