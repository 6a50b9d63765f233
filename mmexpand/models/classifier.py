"""Base class of the classifiers: the three modes of an OpenMMLab model."""

from mmengine.model import BaseModel
from torch import Tensor
from torch.nn import functional as F


class Classifier(BaseModel):
    """A model that gives each image one score per class."""

    def logits(self, inputs: Tensor) -> Tensor:
        """Return scores ``(N, num_classes)``."""
        raise NotImplementedError

    def forward(
        self, inputs: Tensor, labels: Tensor | None = None, mode: str = 'tensor'
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return logits ``(N, num_classes)``, the loss, or a label and scores per image."""
        logits = self.logits(inputs)
        if mode == 'tensor':
            return logits
        if mode == 'loss':
            return dict(loss=F.cross_entropy(logits, labels))
        return self.predictions(logits, labels)

    @staticmethod
    def predictions(logits: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
        """Return the predicted and the true label of each image."""
        found = logits.argmax(1)
        return [dict(pred_label=p, gt_label=t) for p, t in zip(found, labels, strict=True)]
