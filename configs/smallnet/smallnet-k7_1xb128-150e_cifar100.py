_base_ = 'smallnet-k7_1xb128-150e_cifar10.py'
data = dict(data_root='data/cifar100/', ann_file='cifar100.zip', val_images=50)
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = dict(dataset=data)
data_preprocessor = dict(mean=[129.3105, 124.1085, 112.404], std=[68.2125, 65.4075, 70.4055])
model = dict(num_classes=100)
