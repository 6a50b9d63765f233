# The published comparison at its full length, 150 epochs, and the same once every arm has its own
# learning rate. For a GPU: tools/analysis_tools/study_graphs.py runs it.
_base_ = 'cifar10_smallnet.py'
results_dir = '../../resources/studies/cifar10_smallnet_150epochs'
lrs = [0.003, 0.01, 0.03, 0.1]
channels_last = False

authors = _base_.data
tuned = {
    **authors,
    'param_scheduler': [
        dict(type='CosineAnnealingLR', T_max=150, by_epoch=True, convert_to_iter_based=True)
    ],
    'optim_wrapper.optimizer.weight_decay': 5e-4,
}


def expand(base, method):
    hook = dict(type='ExpandHook', include='features', method=method, rate=4)
    return dict(base, custom_hooks=[hook])


arms = dict(
    _delete_=True,
    compact=dict(config=_base_.config, cfg_options=tuned),
    ck=dict(config=_base_.config, cfg_options=expand(tuned, 'ck')),
    cl=dict(config=_base_.config, cfg_options=expand(tuned, 'cl')),
    compact_authors=dict(config=_base_.config, cfg_options=authors, lr=0.01),
    ck_authors=dict(config=_base_.config, cfg_options=expand(authors, 'ck'), lr=0.01),
    cl_authors=dict(config=_base_.config, cfg_options=expand(authors, 'cl'), lr=0.01),
)
