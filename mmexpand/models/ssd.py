"""mmdet's SSD head with a fix: mmdet 3.3.0 cannot predict with it (its issue 11063)."""

from mmdet.models.dense_heads import SSDHead

if not hasattr(SSDHead, 'loss_cls'):
    # The base class asks the loss for the activation of scores, and SSD's loss is a function.
    SSDHead.loss_cls = None
