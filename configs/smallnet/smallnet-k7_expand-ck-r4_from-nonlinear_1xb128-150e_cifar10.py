_base_ = 'smallnet-k7_expand-ck-r4_1xb128-150e_cifar10.py'
load_from = 'work_dirs/smallnet-k7_expand-ck-r4_nonlinear_1xb128-150e_cifar10/epoch_150.pth'
