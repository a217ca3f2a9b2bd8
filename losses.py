"""The training loss, binary cross-entropy and soft IoU weighed against each other, and how the host reads it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data.processes import summed


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
        probability = logits.sigmoid()
        bce = F.binary_cross_entropy_with_logits(logits, label, reduction="sum")
        pixels = torch.full_like(bce, label.numel())
        sums = torch.stack([bce, pixels, (probability * label).sum(), (probability + label).sum()])
        # Under torchrun each process trains on a share of the batch, but is scored on batches of its own.
        bce, pixels, intersection, both = summed(sums) if logits.requires_grad else sums
        soft_iou = (intersection + 1) / (both - intersection + 1)
        return self.alpha * bce / pixels + (1 - self.alpha) * (1 - soft_iou)


class LossReader:
    """The loss of each step of a pass, read by the host a step late, so that it never waits for a GPU."""

    def __init__(self, name: str, loader: DataLoader, device: torch.device):
        self._name, self._loader, self._steps = name, loader, 0
        self._on_host = torch.zeros((), pin_memory=device.type == "cuda")
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None

    def exchange(self, loss: Tensor) -> float:
        """Take in a step's loss, give that of the step before."""
        before = self.last()
        self._on_host.copy_(loss.detach(), non_blocking=True)
        if self._arrived:
            self._arrived.record()
        self._steps += 1
        return before

    def last(self) -> float:
        """The loss taken in last; FloatingPointError, with the step's files, where it isn't finite."""
        if self._arrived:
            self._arrived.synchronize()
        if not self._on_host.isfinite():
            files = self._loader.dataset.files(self._loader.batch_sampler.batch(self._steps - 1))
            raise FloatingPointError(
                f"{self._name}, step {self._steps}: the loss is {self._on_host}; the batch: {files}"
            )
        return self._on_host.item()
