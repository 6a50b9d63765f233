# Which blocks help a classifier that is fine-tuned on little data? SmallNet, trained on five
# classes of CIFAR-10, fine-tuned on 1,000 images of the other five. First train the given network:
#   python tools/train.py configs/smallnet/smallnet-k7_1xb128-15e_cifar10-first5.py \
#       --cfg-options randomness.seed=0
_base_ = 'cifar10_smallnet.py'
# Each arm's best rate of 0.003, 0.01, 0.03 and 0.1 with another given network; DBB's of two.
lrs = [0.01, 0.03]
seeds = [0, 1, 2]
results_dir = '../../resources/studies/cifar10_smallnet_finetune'
config = '../smallnet/smallnet-k7_1xb50-40e_cifar10-last5-1000images.py'


def finetuned(lr, **fields):
    hook = dict(type='ExpandHook', include='features', **fields)
    return dict(config=config, cfg_options=dict(custom_hooks=[hook]), lr=lr)


arms = dict(
    _delete_=True,
    compact=dict(config=config, lr=0.03),
    ck=finetuned(0.01, method='ck', rate=4, init='preserve'),
    bn=finetuned(0.03, method='bn'),
    repvgg=finetuned(0.01, method='repvgg'),
    qarepvgg=finetuned(0.01, method='qarepvgg'),
    dbb=finetuned(0.01, method='dbb'),
)
