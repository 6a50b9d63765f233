_base_ = 'smallnet-k7_1xb128-150e_cifar10.py'
# A network to fine-tune: it is trained on five of the ten classes (first five by name).
metainfo = dict(classes=('airplane', 'automobile', 'bird', 'cat', 'deer'))
model = dict(num_classes=5)
train_dataloader = dict(dataset=dict(metainfo=metainfo))
val_dataloader = dict(dataset=dict(metainfo=metainfo))
test_dataloader = dict(dataset=dict(metainfo=metainfo))
max_epochs = 15
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
optim_wrapper = dict(optimizer=dict(lr=0.1, weight_decay=5e-4))
param_scheduler = [
    dict(type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, convert_to_iter_based=True)
]
