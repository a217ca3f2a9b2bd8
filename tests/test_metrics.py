"""ChangeMetrics against scikit-learn and against published facts."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn import metrics as sk

from dataset import IGNORED
from metrics import ChangeMetrics, match_objects, object_scores, to_classes


def counted(logits: object, label: object) -> ChangeMetrics:
    """The metrics of one class, of a row of pixels."""
    metrics = ChangeMetrics()
    metrics.update(*(torch.as_tensor(array, dtype=torch.float32).reshape(1, 1, 1, -1) for array in (logits, label)))
    return metrics


def random_split(shift: float = -2) -> tuple[ChangeMetrics, np.ndarray, np.ndarray]:
    """The metrics of three batches, and all their labels and logits; some logits are exactly 0."""
    rng, metrics, seen = np.random.default_rng(0), ChangeMetrics(), []
    for pairs in (4, 4, 1):
        label = (rng.random((pairs, 1, 32, 24)) < 0.1).astype(np.uint8)
        logits = (3 * rng.normal(size=label.shape) + 4 * label + shift).astype(np.float32)
        logits[0, 0, 0] = 0
        metrics.update(torch.from_numpy(logits), torch.from_numpy(label))
        seen.append((label.ravel(), logits.ravel()))
    return metrics, *(np.concatenate(arrays) for arrays in zip(*seen, strict=True))


def test_equal_to_scikit_learn_over_batches_of_any_size():
    metrics, truth, logits = random_split()
    guess = logits > 0
    expected = {
        "dice": sk.f1_score(truth, guess),
        "iou": sk.jaccard_score(truth, guess),
        "precision": sk.precision_score(truth, guess),
        "recall": sk.recall_score(truth, guess),
        "accuracy": sk.accuracy_score(truth, guess),
        "mean_dice": sk.f1_score(truth, guess, average="macro"),
        "mean_iou": sk.jaccard_score(truth, guess, average="macro"),
    }
    assert metrics.compute() == pytest.approx(expected, abs=1e-12)
    metrics.reset()
    with pytest.raises(ValueError, match="no pixels"):
        metrics.compute()


@pytest.mark.parametrize("threshold", [0.5, 0.2, 0.8])
def test_several_classes_equal_scikit_learns(threshold):
    rng, metrics, seen = np.random.default_rng(0), ChangeMetrics(3), []
    for pairs in (4, 1):
        label = rng.choice(4, (pairs, 1, 32, 24), p=[0.8, 0.1, 0.07, 0.03])
        logits = rng.normal(size=(pairs, 3, 32, 24)) + 3 * (label == [[[1]], [[2]], [[3]]]) - 2
        metrics.update(torch.from_numpy(logits), torch.from_numpy(label.astype(np.uint8)))
        odds = np.exp(logits).sum(1)
        seen.append((label.ravel(), np.where(odds / (1 + odds) > threshold, 1 + logits.argmax(1), 0).ravel()))
    truth, guess = (np.concatenate(arrays) for arrays in zip(*seen, strict=True))
    iou, dice = sk.jaccard_score(truth, guess, average=None), sk.f1_score(truth, guess, average=None)
    expected = {f"iou_{i}": iou[i] for i in (1, 2, 3)} | {f"dice_{i}": dice[i] for i in (1, 2, 3)}
    expected |= {"iou": iou[1:].mean(), "mean_iou": iou.mean(), "dice": dice[1:].mean(), "mean_dice": dice.mean()}
    for name, score in (("precision", sk.precision_score), ("recall", sk.recall_score)):
        expected[name] = score(truth, guess, average="macro", labels=[1, 2, 3])
    expected["accuracy"] = sk.accuracy_score(truth, guess)
    tolerance = 1e-12 if threshold == 0.5 else 0.01  # the nearest of the 321 thresholds
    assert metrics.compute(threshold) == pytest.approx(expected, abs=tolerance)
    curve, best = metrics.curve(), metrics.best_threshold()
    assert metrics.compute(best)["iou"] == pytest.approx(curve["iou"][1:].max())
    right = (guess == truth) & (truth > 0)
    at = np.abs(curve["threshold"] - threshold).argmin()
    assert curve["recall"][at] == pytest.approx(right.sum() / (truth > 0).sum(), abs=tolerance)
    assert curve["precision"][at] == pytest.approx(right.sum() / (guess > 0).sum(), abs=tolerance)


def test_a_class_that_is_nowhere_labelled_does_not_count():
    label, logits = torch.zeros(1, 1, 4, 4), torch.full((1, 3, 4, 4), -9.0)
    label[..., :2, :] = 1
    logits[:, 0, :1] = 9  # half of class 1 is found
    logits[:, 2, 3, 3] = 9  # and one pixel of class 3, which isn't there
    metrics = ChangeMetrics(3)
    metrics.update(logits, label)
    scores = metrics.compute()
    assert scores["iou"] == scores["iou_1"] == 0.5
    assert (scores["iou_2"], scores["iou_3"]) == (1, 0)
    assert metrics.curve()["iou"][161] == 0.5


def test_a_pixel_is_its_likeliest_class_where_change_is_likely():
    probability = np.array([[0.2, 0.4, 0.6, 0.3], [0.2, 0.2, 0.1, 0.4]]).reshape(2, 2, 2)
    assert to_classes(probability).tolist() == [[0, 1], [1, 2]]
    assert to_classes(probability, 0.65).tolist() == [[0, 0], [1, 2]]
    assert to_classes(probability[0]).tolist() == to_classes(probability[:1]).tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("classes", [1, 3])
def test_ignored_pixels_count_nowhere(classes):
    rng = np.random.default_rng(0)
    label, ignored = rng.integers(0, 1 + classes, (1, 1, 16, 16)), rng.random((1, 1, 16, 16)) < 0.3
    logits, metrics = torch.from_numpy(rng.normal(size=(1, classes, 16, 16))), ChangeMetrics(classes)
    metrics.update(logits, torch.from_numpy(np.where(ignored, 255, label)).byte())
    guess = np.where(logits.logsumexp(1).numpy() > 0, 1 + logits.argmax(1).numpy(), 0)
    truth, guess = label[~ignored], guess[:, None][~ignored]
    assert metrics.compute()["mean_iou"] == pytest.approx(sk.jaccard_score(truth, guess, average="macro"))
    assert metrics.compute()["accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))


def test_empty_and_full_masks():
    empty, full = np.zeros(100), np.ones(100)
    for right in (counted(empty - 1, empty), counted(full, full)):
        assert set(right.compute().values()) == {1.0}
    for wrong in (counted(full, empty), counted(empty - 1, full)):
        assert set(wrong.compute().values()) == {0.0}


# Thresholds


def test_curve_and_average_precision_equal_scikit_learns_on_the_same_steps():
    metrics, label, logits = random_split()
    steps = np.searchsorted(metrics.LOGITS.numpy(), logits)  # probabilities, told apart as far as the thresholds do
    precision, recall, reached = sk.precision_recall_curve(label, steps)
    curve = metrics.curve()
    assert curve["precision"][reached] == pytest.approx(precision[:-1], abs=1e-6)
    assert curve["recall"][reached] == pytest.approx(recall[:-1], abs=1e-6)
    assert metrics.average_precision() == pytest.approx(sk.average_precision_score(label, steps), abs=1e-6)
    assert metrics.average_precision() == pytest.approx(sk.average_precision_score(label, logits), abs=0.01)


def test_the_best_threshold_is_best():
    metrics, label, logits = random_split(shift=0)
    best = metrics.best_threshold()
    probability = 1 / (1 + np.exp(-logits.astype(float)))
    every = [sk.jaccard_score(label, probability > threshold) for threshold in metrics.curve()["threshold"]]
    iou = metrics.compute(best)["iou"]
    assert iou == pytest.approx(max(every)) == pytest.approx(sk.jaccard_score(label, probability > best))
    assert best != 0.5 and iou > metrics.compute()["iou"]


def test_thresholds_where_many_are_equal_or_none_is_good():
    perfect = counted([-5, 5], [0, 1])
    assert perfect.best_threshold() == 0.5 and perfect.average_precision() == 1  # the middle one
    unlabelled = counted(torch.randn(64) - 20, torch.zeros(64))
    assert unlabelled.average_precision() == 0 and unlabelled.best_threshold() == 0.5
    assert set(unlabelled.compute().values()) == {1.0}
    assert all(np.isfinite(values).all() for values in unlabelled.curve().values())
    low = counted(torch.full((16,), -20), torch.ones(16))  # only "all of it" would be right, but isn't a threshold
    assert low.compute(low.best_threshold())["iou"] == low.curve()["iou"][1:].max() == 0
    unknown = counted(torch.full((16,), torch.nan), torch.ones(16))  # counts as unchanged
    assert unknown.compute()["iou"] == 0 and unknown.curve()["iou"][1:].max() == 0


def test_a_pixel_is_changed_above_one_half_and_not_at_it():
    """However near: what is counted lies in steps of the logit, but 0 is the edge of one."""
    assert counted([0, 1e-30, -1e-30, 1e-6], torch.ones(4)).compute()["recall"] == 0.5


# Objects


def test_scores_of_objects():
    assert object_scores(1, 3, 2) == {
        "object_precision": 0.5, "object_recall": pytest.approx(1 / 3), "object_f1": 0.4, "objects_labelled": 3,
        "objects_predicted": 2, "objects_matched": 1,
    }  # fmt: skip
    for counts, score in (((0, 0, 0), 1), ((0, 2, 0), 0)):
        scores = object_scores(*counts)
        assert scores["object_precision"] == scores["object_recall"] == scores["object_f1"] == score


def matched_by_force(predicted: np.ndarray, label: np.ndarray) -> tuple[int, int, int]:
    """Matched, labelled and predicted objects, by comparing all with all."""

    def objects(mask: np.ndarray) -> list[tuple[int, np.ndarray]]:
        found = []
        for kind in (1, 2):
            numbers, count = ndimage.label(mask == kind)
            found += [(kind, numbers == number) for number in range(1, count + 1)]
        return found

    ours, theirs = objects(predicted), objects(label)
    pairs = [(a, b) for kind, a in ours for other, b in theirs if kind == other]
    return sum((a & b).sum() / (a | b).sum() > 0.5 for a, b in pairs), len(theirs), len(ours)


def test_objects_match_as_by_brute_force():
    rng, matched = np.random.default_rng(0), 0
    for _ in range(100):
        shape = rng.integers(1, 14, 2)
        label = ((rng.random(shape) < 0.5) * rng.integers(1, 3, shape)).astype(np.uint8)
        predicted = np.where(rng.random(shape) < 0.15, rng.integers(0, 3, shape), label).astype(np.uint8)
        counts = match_objects(predicted, label)
        assert counts == matched_by_force(predicted, label)
        matched += counts[0]
    assert matched > 300


def test_objects_worked_by_hand():
    label, predicted = np.zeros((2, 6, 12), np.uint8)
    label[0:2, 0:4] = label[4:6, 0:4] = 1
    predicted[0:6, 0:4] = 1  # one covers two: 8 of 24 pixels are either's
    label[0:2, 8:12] = predicted[0, 8:12] = 1  # half of it
    assert match_objects(predicted, label) == (0, 3, 2)
    predicted[1, 8] = 1  # five of eight pixels
    assert match_objects(predicted, label) == (1, 3, 2)
    label[0:2, 8:12] = IGNORED
    assert match_objects(predicted, label) == (0, 2, 1)
    assert match_objects(np.zeros((3, 3), np.uint8), np.zeros((3, 3), np.uint8)) == (0, 0, 0)
