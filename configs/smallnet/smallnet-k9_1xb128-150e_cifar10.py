_base_ = 'smallnet-k7_1xb128-150e_cifar10.py'
model = dict(kernel_size=9)
