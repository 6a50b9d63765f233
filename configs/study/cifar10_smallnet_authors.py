# The published comparison: the same arms and results, against the compact network trained as the
# authors train theirs. `tools/study.py THIS --report-only`
_base_ = 'cifar10_smallnet.py'
baseline = 'compact_authors'
