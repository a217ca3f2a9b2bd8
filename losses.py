"""The training loss: binary cross-entropy and soft IoU, weighed against each other."""

import torch.nn.functional as F
from torch import Tensor, nn


class CombinedIoULoss(nn.Module):
    """alpha · BCE + (1 − alpha) · (1 − soft IoU).

    BCE is averaged over every pixel of the batch. With p = sigmoid(logits) and y the label,

        soft IoU = (Σ p·y + 1) / (Σ (p + y − p·y) + 1)

    where the sums run over the whole batch, so that a crop without change weighs as little as it holds
    (Rahman and Wang 2016, doi:10.1007/978-3-319-50835-1_22). The added 1, one pixel, makes the soft IoU of an
    all-empty batch 1 once nothing is predicted; until then BCE supplies the gradient there, so keep alpha > 0
    where batches may hold no change at all.

    Args:
        alpha: weight of BCE, 0..1.
    """

    def __init__(self, alpha: float = 0.5):
        super().__init__()
        self.alpha = alpha

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Scalar float32 loss, also under autocast.

        Args:
            logits: (N, 1, H, W), any float dtype.
            label: (N, 1, H, W) in {0, 1}, any dtype.
        """
        logits, label = logits.float(), label.float()
        bce = F.binary_cross_entropy_with_logits(logits, label)
        probability = logits.sigmoid()
        intersection = (probability * label).sum()
        union = probability.sum() + label.sum() - intersection
        soft_iou = (intersection + 1) / (union + 1)
        return self.alpha * bce + (1 - self.alpha) * (1 - soft_iou)
