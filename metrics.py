"""Scores from counts over a whole split, never averaged over batches."""

import numpy as np
import torch
from torch import Tensor

from data.processes import summed


class ChangeMetrics:
    """Pixel counts of a binary mask, gathered on the device, and the scores that follow from them.

    With the change class positive, from the counts TP, FP, FN, TN over everything seen since `reset`:

        dice (= F1)  2·TP / (2·TP + FP + FN)        precision  TP / (TP + FP)
        iou          TP / (TP + FP + FN)            recall     TP / (TP + FN)
        accuracy     (TP + TN) / (TP + FP + FN + TN)
        mean_dice, mean_iou   the mean of the score of the change class and of the unchanged class

    A score whose denominator is 0 is 1 where the class is neither in the label nor predicted, 0 otherwise.
    """

    CELLS = 4  # counted: TP, predicted, labelled, pixels

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self._counts = torch.zeros(self.CELLS, dtype=torch.int64)  # moves to the logits' device

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Count a batch; a pixel counts as changed where its logit is above 0. No host sync.

        Args:
            logits: float (N, 1, H, W).
            label: (N, 1, H, W) in {0, 1}, on the same device.
        """
        predicted, labelled = logits > 0, label.bool()
        hits = predicted & labelled
        pixels = torch.full((), label.numel(), device=label.device)
        self._count(torch.stack([hits.sum(), predicted.sum(), labelled.sum(), pixels]))

    def compute(self) -> dict[str, float]:
        """The scores as plain floats in 0..1; one host sync.

        Raises:
            ValueError: nothing was counted yet.
        """
        return _scores(*self._gathered().tolist())

    def sum_processes(self) -> None:
        """Add up what the processes that torchrun started have counted; each then has the same scores."""
        self._counts = summed(self._counts.cpu())

    def _count(self, counts: Tensor) -> None:
        self._counts = self._counts.to(counts.device) + counts

    def _gathered(self) -> Tensor:
        counts = self._counts.cpu()  # the one host sync
        if not counts.any():
            raise ValueError("no pixels were counted: call update first")
        return counts


class ThresholdMetrics(ChangeMetrics):
    """The same scores at any of 321 thresholds, and the precision-recall curve, from one pass.

    The thresholds lie evenly over the logits from -8 to 8, not over the probabilities, which crowd at 0 and 1;
    the middle one is a probability of 0.5. What is kept is a histogram, not the probabilities.
    """

    LOGITS = torch.arange(-160, 161) / 20
    CELLS = 2 * (len(LOGITS) + 1)

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Count a batch at every threshold; shapes as in `ChangeMetrics`; NaN counts as below all. No host sync."""
        steps, logits = self.LOGITS.to(logits.device), logits.detach().float().nan_to_num(nan=-torch.inf)
        passed = torch.bucketize(logits.contiguous(), steps)  # how many thresholds a pixel's logit is above
        cells = (passed + (len(steps) + 1) * label.bool()).flatten()
        histogram = torch.zeros(self.CELLS, dtype=torch.int64, device=logits.device)
        self._count(histogram.index_add_(0, cells, torch.ones_like(cells)))

    def compute(self, threshold: float = 0.5) -> dict[str, float]:
        """The scores at the nearest of the thresholds; one host sync.

        Args:
            threshold: a pixel counts as changed where its probability is above this, 0..1.

        Raises:
            ValueError: nothing was counted yet.
        """
        nearest = int((self.LOGITS.double().sigmoid() - threshold).abs().argmin())
        return _scores(*(int(count[1 + nearest]) for count in self._cumulated()))

    def curve(self) -> dict[str, np.ndarray]:
        """The precision-recall curve: `threshold`, `precision`, `recall` and `iou`, float64 (322,) each.

        The thresholds are probabilities and rise from 0, where everything counts as changed. Where nothing is
        predicted any more, precision is 1.
        """
        tp, predicted, labelled, _ = (count.double().numpy() for count in self._cumulated())
        return {
            "threshold": np.concatenate([[0.0], self.LOGITS.double().sigmoid().numpy()]),
            "precision": np.where(predicted > 0, tp / np.maximum(predicted, 1), 1.0),
            "recall": tp / np.maximum(labelled, 1),
            "iou": tp / np.maximum(predicted + labelled - tp, 1),
        }

    def average_precision(self) -> float:
        """Precision averaged over the steps in recall, 0..1, as scikit-learn's; 0 where nothing is labelled."""
        curve = self.curve()
        return float(-np.diff(curve["recall"], append=0.0) @ curve["precision"])

    def best_threshold(self) -> float:
        """The probability at which IoU (and so Dice) is highest; of equals, the nearest to 0.5."""
        threshold, iou = self.curve()["threshold"][1:], self.curve()["iou"][1:]
        return float(threshold[np.lexsort([np.abs(threshold - 0.5), -iou])[0]])

    def _cumulated(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """TP, predicted, labelled and pixels, int64 (322,), at a threshold below all and at each of LOGITS."""
        unchanged, changed = self._gathered().view(2, -1).flip(1).cumsum(1).flip(1)
        predicted = unchanged + changed
        return changed, predicted, changed[:1].expand_as(changed), predicted[:1].expand_as(predicted)


def as_table(rows: dict[str, dict[str, float]]) -> str:
    """Scores by row name as text, Dice under its other name, F1."""
    columns = ("precision", "recall", "dice", "iou", "mean_dice", "mean_iou", "accuracy")
    lines = [f"{'':34}" + "".join(f"{'F1' if name == 'dice' else name:>11}" for name in columns)]
    lines += [f"{title:34}" + "".join(f"{row[name]:11.4f}" for name in columns) for title, row in rows.items()]
    return "\n".join(lines)


def _scores(tp: int, predicted: int, labelled: int, pixels: int) -> dict[str, float]:
    fp, fn, tn = predicted - tp, labelled - tp, pixels - predicted - labelled + tp

    def ratio(numerator: int, denominator: int) -> float:
        return numerator / denominator if denominator else float(fp + fn == 0)

    dice, iou = ratio(2 * tp, 2 * tp + fp + fn), ratio(tp, tp + fp + fn)
    return {
        "dice": dice,
        "iou": iou,
        "precision": ratio(tp, predicted),
        "recall": ratio(tp, labelled),
        "accuracy": (tp + tn) / pixels,
        "mean_dice": (dice + ratio(2 * tn, 2 * tn + fp + fn)) / 2,
        "mean_iou": (iou + ratio(tn, tn + fp + fn)) / 2,
    }
