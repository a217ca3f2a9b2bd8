"""CombinedIoULoss against values worked by hand and NumPy's differences."""

import math

import numpy as np
import pytest
import torch

from losses import CombinedIoULoss


def by_numpy(logits: np.ndarray, label: np.ndarray, alpha: float) -> float:
    """The docstring's formula in float64, for logits (K, pixels) and label (pixels,) of all images of a batch."""
    p = np.exp(logits) / (1 + np.exp(logits).sum(0))
    unchanged, soft_iou = 1 - p.sum(0), []
    cross_entropy = np.where(label == 0, -np.log(unchanged), 0)
    for i, p_class in enumerate(p, 1):
        y = label == i
        cross_entropy -= y * np.log(p_class)
        soft_iou.append(((p_class * y).sum() + 1) / ((p_class + y - p_class * y).sum() + 1))
    return alpha * cross_entropy.mean() + (1 - alpha) * (1 - np.mean(soft_iou))


def test_worked_by_hand():
    # Every p is 1/2: BCE is ln 2; one of four labelled: Σ p·y = 1/2 and Σ (p + y − p·y) = 2 + 1 − 1/2.
    logits, label = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1, 0], [0, 0]]]], dtype=torch.uint8)
    assert CombinedIoULoss(1.0)(logits, label).item() == pytest.approx(math.log(2))
    assert CombinedIoULoss(0.0)(logits, label).item() == pytest.approx(1 - 1.5 / 3.5)
    assert CombinedIoULoss(0.25)(logits, label).item() == pytest.approx(0.25 * math.log(2) + 0.75 * (1 - 1.5 / 3.5))


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("share", [0, 0.4])
def test_value_and_gradient_equal_numerical_ones_without_the_ignored_pixels(classes, share):
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(classes, 12)), rng.integers(0, 1 + classes, 12)
    valid = rng.random(12) >= share
    tensor = torch.tensor(logits.reshape(classes, 2, 3, 2), requires_grad=True)  # of two images
    loss = CombinedIoULoss(0.3)(tensor.swapaxes(0, 1), torch.tensor(np.where(valid, label, 255).reshape(2, 1, 3, 2)))
    loss.backward()

    def expected(change: np.ndarray | float = 0) -> float:
        return by_numpy((logits + change)[:, valid], label[valid], 0.3)

    assert loss.item() == pytest.approx(expected(), rel=1e-5)
    for i in range(logits.size):
        step = np.eye(logits.size)[i].reshape(logits.shape) * 1e-5
        slope = (expected(step) - expected(-step)) / 2e-5
        assert tensor.grad.flatten()[i].item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("start", [-30.0, 0.0, 30.0])
def test_empty_and_full_masks_pull_the_right_way(value, start):
    logits = torch.full((2, 1, 16, 16), start, requires_grad=True)
    loss = CombinedIoULoss(0.5)(logits, torch.full((2, 1, 16, 16), value))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    solved = start == (30.0 if value else -30.0)
    pull = -logits.grad.sum().item() * (1 if value else -1)
    assert loss.item() < 1e-4 if solved else pull > 0.05


def test_float32_under_autocast():
    logits = torch.full((1, 1, 300, 300), 2.0, dtype=torch.bfloat16)
    label = torch.ones(1, 1, 300, 300, dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = CombinedIoULoss(0.0)(logits, label)
    assert loss.dtype == torch.float32  # in bfloat16 a sum of 90,000 ones stops at 256
    assert loss.item() == pytest.approx(by_numpy(np.full((1, 90000), 2.0), np.ones(90000), 0.0), rel=1e-4)


def test_a_batch_of_ignored_pixels_alone_teaches_nothing():
    logits = torch.randn(1, 1, 4, 4, requires_grad=True)
    CombinedIoULoss()(logits, torch.full((1, 1, 4, 4), 255)).backward()
    assert not logits.grad.any()
