"""The training loss, cross-entropy and soft IoU weighed against each other, and how the host reads it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data.processes import summed


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
            label: (N, 1, H, W) in {0, …, K}, any dtype.
        """
        log_p = F.pad(logits.float(), (0, 0, 0, 0, 1, 0)).log_softmax(1)  # (N, 1 + K, H, W)
        cross_entropy = F.nll_loss(log_p, label[:, 0].long(), reduction="none").sum()  # "sum" isn't deterministic
        p, y = log_p[:, 1:].exp(), label == torch.arange(1, log_p.shape[1], device=label.device).view(-1, 1, 1)
        pixels = torch.full_like(cross_entropy, label.numel())
        sums = [cross_entropy, pixels, *(p * y).sum((0, 2, 3)), *(p + y.float()).sum((0, 2, 3))]
        # Under torchrun each process trains on a share of the batch, but is scored on batches of its own.
        sums = summed(torch.stack(sums)) if logits.requires_grad else torch.stack(sums)
        intersection, both = sums[2:].view(2, -1)
        soft_iou = (intersection + 1) / (both - intersection + 1)
        return self.alpha * sums[0] / sums[1] + (1 - self.alpha) * (1 - soft_iou.mean())


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
