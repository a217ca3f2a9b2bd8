"""Scores from counts over a whole split, never averaged over batches."""

import numpy as np
import torch
from torch import Tensor

from data.processes import summed


class ChangeMetrics:
    """Pixel counts of each class, gathered on the device, and the scores that follow from them.

    With one class positive, the others negative, from the counts TP, FP, FN over everything seen since `reset`:

        dice (= F1)  2·TP / (2·TP + FP + FN)        precision  TP / (TP + FP)
        iou          TP / (TP + FP + FN)            recall     TP / (TP + FN)
        accuracy     the share of the pixels that are given their class

    `dice`, `iou`, `precision` and `recall` are of the change class; of several, the mean over those in the label, and
    `iou_1`, `dice_1`, … are each one's. `mean_dice` and `mean_iou` are means over all classes, unchanged too. A score
    whose denominator is 0 is 1 where the class is neither in the label nor predicted, 0 otherwise.

    Args:
        num_classes: classes of change, K.
    """

    def __init__(self, num_classes: int = 1) -> None:
        self.num_classes = num_classes
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self._counts = torch.zeros(self._shape(), dtype=torch.int64)  # moves to the logits' device

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Count a batch; a pixel counts as changed where change is likelier than 0.5, and then as its likeliest class.

        No host sync.

        Args:
            logits: float (N, K, H, W), as in `CombinedIoULoss`.
            label: (N, 1, H, W) in {0, …, K}, on the same device.
        """
        change, kind = _change(logits)
        classes = torch.arange(1 + self.num_classes, device=label.device)[:, None]
        predicted, labelled = (kind * (change > 0)).flatten() == classes, label.flatten() == classes
        self._count(torch.stack([(pixels & labelled).sum(1) for pixels in predicted]))

    def compute(self) -> dict[str, float]:
        """The scores as plain floats in 0..1; one host sync.

        Raises:
            ValueError: nothing was counted yet.
        """
        return _scores(self._gathered().double().numpy())

    def sum_processes(self) -> None:
        """Add up what the processes that torchrun started have counted; each then has the same scores."""
        self._counts = summed(self._counts.cpu())

    def _shape(self) -> tuple[int, ...]:
        return 1 + self.num_classes, 1 + self.num_classes  # predicted, labelled

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

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Count a batch at every threshold; shapes as in `ChangeMetrics`; NaN counts as below all. No host sync."""
        steps = self.LOGITS.to(logits.device)
        change, kind = _change(logits.detach().float().nan_to_num(nan=-torch.inf))
        passed = torch.bucketize(change.contiguous(), steps)  # how many thresholds a pixel's logit is above
        cells = (((kind - 1) * (1 + self.num_classes) + label.long()) * (len(steps) + 1) + passed).flatten()
        histogram = torch.zeros(self._shape(), dtype=torch.int64, device=logits.device)
        histogram.view(-1).index_add_(0, cells, torch.ones_like(cells))
        self._count(histogram)

    def compute(self, threshold: float = 0.5) -> dict[str, float]:
        """The scores at the nearest of the thresholds; one host sync.

        Args:
            threshold: a pixel counts as changed where its probability of change is above this, 0..1.

        Raises:
            ValueError: nothing was counted yet.
        """
        nearest = int((self.LOGITS.double().sigmoid() - threshold).abs().argmin())
        passed, all_pixels = self._passed()[[1 + nearest, 0]]
        return _scores(np.vstack([(all_pixels - passed).sum(0), passed]))

    def curve(self) -> dict[str, np.ndarray]:
        """The precision-recall curve: `threshold`, `precision`, `recall` and `iou`, float64 (322,) each.

        The thresholds are probabilities and rise from 0, where everything counts as changed. Where nothing is
        predicted any more, precision is 1. Of several classes, precision and recall are of all pixels that changed,
        right where the class is, and `iou` is the mean.
        """
        passed = self._passed()
        tp, predicted, labelled = passed.diagonal(1, 1, 2), passed.sum(2), passed[0, :, 1:].sum(0)
        return {
            "threshold": np.concatenate([[0.0], self.LOGITS.double().sigmoid().numpy()]),
            "precision": np.where(predicted.any(1), tp.sum(1) / np.maximum(predicted.sum(1), 1), 1.0),
            "recall": tp.sum(1) / np.maximum(labelled.sum(), 1),
            "iou": _mean_of_labelled(tp / np.maximum(predicted + labelled - tp, 1), labelled),
        }

    def average_precision(self) -> float:
        """Precision averaged over the steps in recall, 0..1, as scikit-learn's; 0 where nothing is labelled."""
        curve = self.curve()
        return float(-np.diff(curve["recall"], append=0.0) @ curve["precision"])

    def best_threshold(self) -> float:
        """The probability at which IoU is highest; of equals, the nearest to 0.5."""
        threshold, iou = self.curve()["threshold"][1:], self.curve()["iou"][1:]
        return float(threshold[np.lexsort([np.abs(threshold - 0.5), -iou])[0]])

    def _shape(self) -> tuple[int, ...]:
        return self.num_classes, 1 + self.num_classes, len(self.LOGITS) + 1  # likeliest, labelled, thresholds passed

    def _passed(self) -> np.ndarray:
        """Pixels by likeliest class of change and label, float64 (322, K, 1 + K): all, then those above each step."""
        return self._gathered().double().flip(2).cumsum(2).flip(2).movedim(2, 0).numpy()


def as_logits(probability: Tensor) -> Tensor:
    """(1, K, H, W), as the metrics take it, of what `FusionUNet.predict` gives: (H, W), or (K, H, W) of several."""
    probability = probability.reshape(1, -1, *probability.shape[-2:])
    unchanged = (1 - probability.sum(1, keepdim=True)).clamp(min=1e-8)  # else several classes tie at infinity
    return (probability / unchanged).log()


def as_table(rows: dict[str, dict[str, float]]) -> str:
    """Scores by row name as text, Dice under its other name, F1."""
    columns = ["precision", "recall", "dice", "iou", "mean_dice", "mean_iou", "accuracy"]
    columns += [name for name in next(iter(rows.values())) if name.startswith("iou_")]
    lines = [f"{'':34}" + "".join(f"{'F1' if name == 'dice' else name:>11}" for name in columns)]
    lines += [f"{title:34}" + "".join(f"{row[name]:11.4f}" for name in columns) for title, row in rows.items()]
    return "\n".join(lines)


def _change(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of any change, and which class of change is likeliest, 1..K; (N, 1, H, W) each."""
    return logits.logsumexp(1, keepdim=True), 1 + logits.argmax(1, keepdim=True)


def _mean_of_labelled(scores: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """The mean over the last axis, classes; of those that are labelled, if any are."""
    return scores[..., labelled > 0].mean(-1) if labelled.any() else scores.mean(-1)


def _scores(confusion: np.ndarray) -> dict[str, float]:
    """The scores of pixel counts (predicted, labelled)."""
    tp, predicted, labelled = confusion.diagonal(), confusion.sum(1), confusion.sum(0)

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.where(whole > 0, part / np.maximum(whole, 1), predicted + labelled == 0)

    dice, iou = share(2 * tp, predicted + labelled), share(tp, predicted + labelled - tp)
    scores = {
        "dice": _mean_of_labelled(dice[1:], labelled[1:]),
        "iou": _mean_of_labelled(iou[1:], labelled[1:]),
        "precision": _mean_of_labelled(share(tp, predicted)[1:], labelled[1:]),
        "recall": _mean_of_labelled(share(tp, labelled)[1:], labelled[1:]),
        "accuracy": tp.sum() / confusion.sum(),
        "mean_dice": dice.mean(),
        "mean_iou": iou.mean(),
    }
    if len(tp) > 2:
        scores |= {f"{name}_{i}": value[i] for name, value in (("dice", dice), ("iou", iou)) for i in range(1, len(tp))}
    return {name: float(value) for name, value in scores.items()}
