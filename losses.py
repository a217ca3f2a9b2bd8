"""The loss of training and validation: cross-entropy and soft IoU, weighed against each other."""

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from dataset import IGNORED


class CombinedIoULoss(nn.Module):
    """alpha · cross-entropy + (1 − alpha) · (1 − soft IoU).

    There is a logit for each class of change; that of "unchanged" is 0. So the probabilities p are a softmax, and with
    one class of change p = sigmoid(logit) and the cross-entropy is the binary one. It is averaged over every pixel of
    the batch. With y = 1 where a class is labelled, 0 elsewhere,

        soft IoU = (Σ p·y + 1) / (Σ (p + y − p·y) + 1), averaged over the classes of change

    where the sums run over the whole batch, so that a crop without change weighs as little as it holds
    (Rahman and Wang 2016, doi:10.1007/978-3-319-50835-1_22). The added 1, one pixel, makes the soft IoU of an
    all-empty batch 1 once nothing is predicted; until then cross-entropy supplies the gradient there, so keep
    alpha > 0 where batches may hold no change at all.

    Args:
        alpha: weight of cross-entropy, 0..1.
    """

    def __init__(self, alpha: float = 0.5):
        super().__init__()
        self.alpha = alpha

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Scalar float32 loss, also under autocast.

        Args:
            logits: (N, K, H, W), any float dtype.
            label: (N, 1, H, W) in {0, …, K}, any dtype; pixels of 255 count nowhere.
        """
        log_p = F.pad(logits.float(), (0, 0, 0, 0, 1, 0)).log_softmax(1)  # (N, 1 + K, H, W)
        counted = label != IGNORED  # (N, 1, H, W)
        cross_entropy = F.nll_loss(log_p, label[:, 0].long(), ignore_index=IGNORED, reduction="none").sum()
        p = log_p[:, 1:].exp() * counted  # reduction="sum" would not be deterministic
        y = label == torch.arange(1, log_p.shape[1], device=label.device).view(-1, 1, 1)
        pixels = counted.sum().to(p.dtype).clamp(min=1)
        sums = torch.stack([cross_entropy, pixels, *(p * y).sum((0, 2, 3)), *(p + y.float()).sum((0, 2, 3))])
        # Under torchrun each process trains on a share of the batch, but is evaluated on different batches.
        if distributed.is_initialized() and logits.requires_grad:
            total = sums.detach().clone()
            distributed.all_reduce(total)
            # The value is that of the whole batch. DistributedDataParallel averages gradients, which shall be summed.
            sums = total + distributed.get_world_size() * (sums - sums.detach())
        intersection, both = sums[2:].view(2, -1)
        soft_iou = (intersection + 1) / (both - intersection + 1)
        return self.alpha * sums[0] / sums[1] + (1 - self.alpha) * (1 - soft_iou.mean())
