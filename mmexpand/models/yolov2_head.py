"""YOLOv2 detection head with darknet's region loss."""

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.utils import filter_scores_and_topk
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures.bbox import bbox_overlaps, get_box_tensor
from mmdet.utils import ConfigType, InstanceList, OptConfigType, OptInstanceList, OptMultiConfig
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ..errors import UserValueError

# Share of the image below which darknet's data loader drops a box's width or height.
MIN_BOX_SHARE = 0.001
# Weight of the warm-up that pulls boxes without an object to their anchors.
ANCHOR_WARMUP_SCALE = 0.01


@MODELS.register_module()
class YOLOV2Head(BaseDenseHead):
    r"""YOLOv2 head: 3x3 convolution, 1x1 convolution, region loss, decoding and NMS.

    Every cell (i, j) and anchor (w_a, h_a) predicts tx, ty, tw, th, to and one score a class:
    x = sigmoid(tx) + i, y = sigmoid(ty) + j, w = w_a exp(tw), h = h_a exp(th), objectness =
    sigmoid(to), class probabilities = softmax of the scores. A detection's score is objectness
    times class probability.

    **Loss.** The gradient is that of darknet's region layer with ``bias_match=1``, ``absolute=1``
    and ``rescore=0``. Darknet defines the gradient only. For one image it is the gradient of
    the loss

    .. math::
        \frac{1}{2} \sum_{resp} \left[s_{coord} \left((\sigma(t_x) - \hat x)^2 +
        (\sigma(t_y) - \hat y)^2 + (t_w - \hat t_w)^2 + (t_h - \hat t_h)^2\right) +
        s_{obj} (1 - \sigma(t_o))^2\right] +
        \frac{1}{2} s_{noobj} \sum_{noobj} \sigma(t_o)^2 + s_{class} \sum_{resp} CE

    averaged over the batch (darknet sums over the batch and divides the learning rate by it).

    - The prediction *responsible* for a box is, in the cell of the box's centre, the one whose
      anchor has the largest IoU with the box when both are centred. When several boxes meet in
      one prediction the last one keeps it.
    - *noobj* are the predictions that are not responsible and whose decoded box has an IoU of at
      most ``noobj_iou_thr`` with every box of the image.
    - Boxes narrower or lower than a thousandth of the image are left out, as darknet's loader
      does; that includes boxes of zero area. So are boxes marked to be ignored ("difficult"),
      which darknet's VOC label script does not write at all.
    - During the first ``anchor_warmup_iters`` iterations every prediction that is not responsible
      is pulled, with weight 0.01, to the centre of its cell and the size of its anchor (darknet:
      the first 12800 images, so 200 iterations of batch 64).

    Source: Redmon and Farhadi, "YOLO9000: Better, Faster, Stronger", 2017, section 2, and
    ``region_layer.c`` of darknet. Its versions differ in one factor: newer ones of the original
    repository multiply the coordinate terms by 2 - w h. The published YOLO-LITE weights carry the
    short file header (version 0.1) and expect a plain resize, both of the AlexeyAB branch, where
    the factor is ``coord_scale`` alone. This head uses the same factor.

    Args:
        num_classes: Number of classes, without background.
        in_channels: Channels of the feature map.
        feat_channels: Channels between the two convolutions.
        anchor_generator: Config of the anchors, one level; sizes and stride in pixels.
        bbox_coder: Config of the box coder.
        object_scale: Weight of the objectness of responsible predictions.
        noobject_scale: Weight of the objectness of predictions that are not responsible.
        coord_scale: Weight of the box terms.
        class_scale: Weight of the classification term.
        noobj_iou_thr: IoU above which a prediction is not punished for its objectness
            (darknet's ``thresh``).
        anchor_warmup_iters: Iterations of the anchor warm-up; 0 turns it off.
        act_cfg: Config of the activation between the convolutions.
        train_cfg: Not used; detectors pass it to every head.
        test_cfg: ``score_thr``, ``nms_pre``, ``nms``, ``max_per_img``.
        init_cfg: Initialisation, by default the one of :class:`YOLOLite`.
    """

    clip_border = True
    """Predicted boxes are clipped to the image, as by box coders with this attribute."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        feat_channels: int = 256,
        anchor_generator: ConfigType = dict(  # noqa: B006
            type='YOLOAnchorGenerator',
            # (1.08, 1.19), (3.42, 4.41), (6.63, 11.38), (9.42, 5.11), (16.62, 10.52) cells of 32
            base_sizes=[
                [
                    (34.56, 38.08),
                    (109.44, 141.12),
                    (212.16, 364.16),
                    (301.44, 163.52),
                    (531.84, 336.64),
                ]
            ],
            strides=[32],
        ),
        bbox_coder: ConfigType = dict(type='YOLOBBoxCoder'),  # noqa: B006
        object_scale: float = 5.0,
        noobject_scale: float = 1.0,
        coord_scale: float = 1.0,
        class_scale: float = 1.0,
        noobj_iou_thr: float = 0.5,
        anchor_warmup_iters: int = 0,
        act_cfg: ConfigType = dict(type='LeakyReLU', negative_slope=0.1),  # noqa: B006
        train_cfg: OptConfigType = None,
        test_cfg: OptConfigType = None,
        init_cfg: OptMultiConfig = dict(  # noqa: B006
            type='Kaiming', layer='Conv2d', a=0.1, mode='fan_in', nonlinearity='leaky_relu'
        ),
    ) -> None:
        super().__init__(init_cfg)
        self.num_classes = num_classes
        self.object_scale = object_scale
        self.noobject_scale = noobject_scale
        self.coord_scale = coord_scale
        self.class_scale = class_scale
        self.noobj_iou_thr = noobj_iou_thr
        self.anchor_warmup_iters = anchor_warmup_iters
        self.train_cfg = train_cfg
        self.test_cfg = test_cfg

        self.prior_generator = TASK_UTILS.build(anchor_generator)
        if self.prior_generator.num_levels != 1:
            raise UserValueError(
                'YOLOV2Head predicts on one level, but anchor_generator has '
                f'{self.prior_generator.num_levels}: give base_sizes and strides one entry each.'
            )
        self.stride = self.prior_generator.strides[0][0]
        self.num_anchors = self.prior_generator.num_base_priors[0]
        self.bbox_coder = TASK_UTILS.build(bbox_coder)
        # In a plain Sequential, ConvModule does not initialise itself after `init_cfg`.
        self.convs = nn.Sequential(
            ConvModule(in_channels, feat_channels, 3, padding=1, act_cfg=act_cfg),
            nn.Conv2d(feat_channels, self.num_anchors * (5 + num_classes), 1),
        )

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Predict, without decoding.

        Args:
            x: Features; the last level is used, shape (N, in_channels, H, W).

        Returns:
            The raw prediction in a tuple, shape (N, num_anchors * (5 + num_classes), H, W). The
            channels are anchor by anchor: tx, ty, tw, th, to, class scores.
        """
        return (self.convs(x[-1]),)

    def decode(self, pred_map: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the raw prediction into boxes and scores, with tensor operations alone.

        Args:
            pred_map: Raw prediction, shape (N, num_anchors * (5 + num_classes), H, W).

        Returns:
            Boxes (x1, y1, x2, y2) in pixels of the network's input, shape (N, P, 4), and scores,
            shape (N, P, num_classes), where P = H * W * num_anchors.
        """
        pred = self._flatten(pred_map)
        boxes = self._decode_boxes(pred, self._priors(pred_map))
        scores = pred[..., 4:5].sigmoid() * pred[..., 5:].softmax(-1)
        return boxes, scores

    def predict_by_feat(
        self,
        pred_map: Tensor,
        batch_img_metas: list[dict],
        cfg: OptConfigType = None,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> InstanceList:
        """Decode, threshold and suppress class by class.

        Args:
            pred_map: Raw prediction, shape (N, num_anchors * (5 + num_classes), H, W).
            batch_img_metas: Meta information of each image.
            cfg: Test config; None means ``test_cfg``.
            rescale: Return boxes in pixels of the original image.
            with_nms: Suppress overlapping boxes.

        Returns:
            Detections of each image, clipped to it: ``bboxes``, ``scores``, ``labels``.
        """
        cfg = self.test_cfg if cfg is None else cfg
        results_list = []
        for boxes, scores, img_meta in zip(*self.decode(pred_map), batch_img_metas, strict=True):
            scores, labels, keep, _ = filter_scores_and_topk(
                scores, cfg.get('score_thr', 0), cfg.get('nms_pre', scores.numel())
            )
            results = self._bbox_post_process(
                InstanceData(bboxes=boxes[keep], scores=scores, labels=labels),
                cfg,
                rescale=rescale,
                with_nms=with_nms,
                img_meta=img_meta,
            )
            height, width = img_meta['ori_shape' if rescale else 'img_shape'][:2]
            # Out of place and on tensors, so that ONNX can express it for any image size.
            sides = [torch.as_tensor(side) for side in (width, height, width, height)]
            limit = torch.stack(sides).to(results.bboxes)
            results.bboxes = torch.minimum(results.bboxes.clamp(min=0), limit)
            results_list.append(results)
        return results_list

    def loss_by_feat(
        self,
        pred_map: Tensor,
        batch_gt_instances: InstanceList,
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: OptInstanceList = None,
    ) -> dict[str, Tensor]:
        """Region loss; see the class for its definition.

        Args:
            pred_map: Raw prediction, shape (N, num_anchors * (5 + num_classes), H, W).
            batch_gt_instances: ``bboxes`` (pixels of the network's input) and ``labels`` of each
                image; either may be empty.
            batch_img_metas: Not used.
            batch_gt_instances_ignore: Not used: ignored boxes are neither objects nor background
                of their own.

        Returns:
            ``loss_xy``, ``loss_wh``, ``loss_obj``, ``loss_noobj``, ``loss_cls``: scalars.
        """
        pred = self._flatten(pred_map)
        targets = [
            self._get_targets_single(p, self._priors(pred_map), gt, pred_map.shape[-2:])
            for p, gt in zip(pred.detach(), batch_gt_instances, strict=True)
        ]
        responsible, noobj, labels, boxes, box_weights = map(
            torch.stack, zip(*targets, strict=True)
        )

        xy_error = (pred[..., :2].sigmoid() - boxes[..., :2]).square().sum(-1)
        wh_error = (pred[..., 2:4] - boxes[..., 2:]).square().sum(-1)
        objectness = pred[..., 4].sigmoid()
        # Half of darknet's squares: it takes the difference itself as the gradient.
        half = 0.5 / len(pred)
        return dict(
            loss_xy=half * (box_weights * xy_error).sum(),
            loss_wh=half * (box_weights * wh_error).sum(),
            loss_obj=half * self.object_scale * (1 - objectness[responsible]).square().sum(),
            loss_noobj=half * self.noobject_scale * objectness[noobj].square().sum(),
            loss_cls=F.cross_entropy(
                pred[..., 5:][responsible], labels[responsible], reduction='sum'
            )
            * (self.class_scale / len(pred)),
        )

    def _get_targets_single(
        self, pred: Tensor, priors: Tensor, gt_instances: InstanceData, featmap_size: torch.Size
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the targets of one image's P predictions.

        Returns:
            responsible (P,), noobj (P,), labels (P,), box targets (P, 4), box weights (P,).
        """
        num_preds = len(pred)
        warmup = MessageHub.get_current_instance().get_info('iter', 0) < self.anchor_warmup_iters
        labels = pred.new_zeros(num_preds, dtype=torch.long)
        box_targets = pred.new_tensor([0.5, 0.5, 0.0, 0.0]).repeat(num_preds, 1)
        box_weights = pred.new_full((num_preds,), ANCHOR_WARMUP_SCALE if warmup else 0.0)

        gt_boxes, gt_labels = self._valid_gts(gt_instances, featmap_size, pred.dtype)
        if len(gt_boxes) == 0:
            responsible = pred.new_zeros(num_preds, dtype=torch.bool)
            return responsible, ~responsible, labels, box_targets, box_weights

        index = self._responsible_index(gt_boxes, featmap_size)
        # `amax` of the box numbers: the last box keeps a shared prediction, on every device.
        owner = index.new_full((num_preds,), -1).scatter_reduce(
            0, index, torch.arange(len(index), device=index.device), 'amax'
        )
        responsible = owner >= 0
        owner = owner[responsible]
        labels[responsible] = gt_labels[owner]
        box_targets[responsible] = self.bbox_coder.encode(
            priors[responsible], gt_boxes[owner], self.stride
        )
        box_weights[responsible] = self.coord_scale

        max_iou = bbox_overlaps(self._decode_boxes(pred, priors), gt_boxes).amax(1)
        noobj = ~responsible & (max_iou <= self.noobj_iou_thr)
        return responsible, noobj, labels, box_targets, box_weights

    def _valid_gts(
        self, gt_instances: InstanceData, featmap_size: torch.Size, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return boxes clipped to the input, and their labels, without boxes of no area."""
        boxes = get_box_tensor(gt_instances.bboxes).to(dtype)
        height, width = (size * self.stride for size in featmap_size)
        limit = boxes.new_tensor([width, height, width, height])
        boxes = boxes.clamp(min=0).minimum(limit)
        valid = (boxes[:, 2:] - boxes[:, :2] >= MIN_BOX_SHARE * limit[:2]).all(1)
        return boxes[valid], gt_instances.labels[valid].long()

    def _responsible_index(self, gt_boxes: Tensor, featmap_size: torch.Size) -> Tensor:
        """Return the index of the flattened prediction that is responsible for each box."""
        height, width = featmap_size
        centres = (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2
        column, row = (centres / self.stride).long().unbind(1)
        half_sizes = (gt_boxes[:, 2:] - gt_boxes[:, :2]) / 2
        half_anchors = gt_boxes.new_tensor(self.prior_generator.base_sizes[0]) / 2
        anchor = bbox_overlaps(
            torch.cat([-half_sizes, half_sizes], 1), torch.cat([-half_anchors, half_anchors], 1)
        ).argmax(1)
        cell = row.clamp(max=height - 1) * width + column.clamp(max=width - 1)
        return cell * self.num_anchors + anchor

    def _flatten(self, pred_map: Tensor) -> Tensor:
        """Reshape (N, A * (5 + C), H, W) to (N, H * W * A, 5 + C), in the priors' order."""
        pred = pred_map.permute(0, 2, 3, 1).reshape(pred_map.shape[0], -1, 5 + self.num_classes)
        return pred.to(torch.promote_types(pred.dtype, torch.float32))

    def _priors(self, pred_map: Tensor) -> Tensor:
        dtype = torch.promote_types(pred_map.dtype, torch.float32)
        return self.prior_generator.grid_priors(
            [pred_map.shape[-2:]], dtype=dtype, device=pred_map.device
        )[0]

    def _decode_boxes(self, pred: Tensor, priors: Tensor) -> Tensor:
        offsets = torch.cat([pred[..., :2].sigmoid(), pred[..., 2:4]], -1)
        return self.bbox_coder.decode(priors, offsets, self.stride)
