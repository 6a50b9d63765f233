# The published comparison at its full length: CIFAR-10, SmallNet, the authors' 150 epochs and rate.
# For a GPU: tools/analysis_tools/study_graphs.py runs it.
_base_ = 'cifar10_smallnet.py'
baseline = 'compact_authors'
results_dir = '../../resources/studies/cifar10_smallnet_150epochs'
channels_last = False


def expand(method):
    hook = dict(type='ExpandHook', include='features', method=method, rate=4)
    return dict(config=_base_.config, cfg_options=dict(custom_hooks=[hook]), lr=0.01)


arms = dict(
    _delete_=True,
    compact_authors=dict(config=_base_.config, lr=0.01),
    ck_authors=expand('ck'),
    cl_authors=expand('cl'),
)
