_base_ = 'smallnet-k7_expand-cl-r4_1xb128-150e_cifar10.py'
model = dict(kernel_size=9)
