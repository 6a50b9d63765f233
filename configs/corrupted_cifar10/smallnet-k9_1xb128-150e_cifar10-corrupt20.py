_base_ = '../smallnet/smallnet-k7_1xb128-150e_cifar10.py'
# Table 7: 9x9 kernels, 20 % of the training labels random; those of val and test are right.
model = dict(kernel_size=9)
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='CorruptLabels',
        fraction=0.2,
        dataset=_base_.train_dataloader.dataset,
    )
)
