"""Scores from counts over a whole split, never averaged over batches."""

import torch
from torch import Tensor


class ChangeMetrics:
    """Pixel counts of a binary mask, gathered on the device, and the scores that follow from them.

    With the change class positive, from the counts TP, FP, FN, TN over everything seen since `reset`:

        dice (= F1)  2·TP / (2·TP + FP + FN)        precision  TP / (TP + FP)
        iou          TP / (TP + FP + FN)            recall     TP / (TP + FN)
        accuracy     (TP + TN) / (TP + FP + FN + TN)
        mean_dice, mean_iou   the mean of the score of the change class and of the unchanged class

    A score whose denominator is 0 is 1 where the class is neither in the label nor predicted, 0 otherwise.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self._counts: Tensor | int = 0  # int64 (4,) on the logits' device: TP, predicted, labelled, pixels

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Count a batch; a pixel counts as changed where its logit is above 0. No host sync.

        Args:
            logits: float (N, 1, H, W).
            label: (N, 1, H, W) in {0, 1}, on the same device.
        """
        predicted, labelled = logits > 0, label.bool()
        hits = predicted & labelled
        pixels = torch.full((), label.numel(), device=label.device)
        self._counts = self._counts + torch.stack([hits.sum(), predicted.sum(), labelled.sum(), pixels])

    def compute(self) -> dict[str, float]:
        """The scores as plain floats in 0..1; one host sync.

        Raises:
            ValueError: nothing was counted yet.
        """
        if isinstance(self._counts, int):
            raise ValueError("no pixels were counted: call update first")
        tp, predicted, labelled, pixels = self._counts.tolist()
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
