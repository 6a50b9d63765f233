"""mmdet's SSD head, mended: mmdet 3.3.0 cannot predict with it (its issue 11063)."""

from mmdet.models.dense_heads import SSDHead

if not hasattr(SSDHead, 'loss_cls'):
    # Its loss is a function; the base class asks this for the activation of the scores.
    SSDHead.loss_cls = None
