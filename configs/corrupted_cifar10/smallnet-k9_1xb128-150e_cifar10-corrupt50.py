_base_ = 'smallnet-k9_1xb128-150e_cifar10-corrupt20.py'
train_dataloader = dict(dataset=dict(fraction=0.5))
