_base_ = 'smallnet-k7_1xb128-150e_cifar10.py'
# Table 8: the compact network, started from an ExpandNet that was contracted untrained, which is
#   python tools/train.py configs/smallnet/smallnet-k7_expand-ck-r4_1xb128-150e_cifar10.py \
#       --work-dir work_dirs/smallnet-k7_expand-ck-r4_untrained \
#       --cfg-options train_cfg.max_epochs=0 param_scheduler=None
load_from = 'work_dirs/smallnet-k7_expand-ck-r4_untrained/compact_last.pth'
