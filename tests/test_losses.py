"""CombinedIoULoss against values worked by hand and NumPy's differences."""

import math

import numpy as np
import pytest
import torch

from losses import CombinedIoULoss


def by_numpy(logits: np.ndarray, label: np.ndarray, alpha: float) -> float:
    """The docstring's formula in float64."""
    p = 1 / (1 + np.exp(-logits))
    bce = -(label * np.log(p) + (1 - label) * np.log(1 - p)).mean()
    soft_iou = ((p * label).sum() + 1) / ((p + label - p * label).sum() + 1)
    return alpha * bce + (1 - alpha) * (1 - soft_iou)


def test_worked_by_hand():
    # Every p is 1/2: BCE is ln 2; one of four labelled: Σ p·y = 1/2 and Σ (p + y − p·y) = 2 + 1 − 1/2.
    logits, label = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1, 0], [0, 0]]]], dtype=torch.uint8)
    assert CombinedIoULoss(1.0)(logits, label).item() == pytest.approx(math.log(2))
    assert CombinedIoULoss(0.0)(logits, label).item() == pytest.approx(1 - 1.5 / 3.5)
    assert CombinedIoULoss(0.25)(logits, label).item() == pytest.approx(0.25 * math.log(2) + 0.75 * (1 - 1.5 / 3.5))


def test_iou_is_of_the_whole_batch():
    logits, label = torch.randn(3, 1, 8, 8), torch.rand(3, 1, 8, 8) > 0.7
    loss = CombinedIoULoss(0.0)
    together = loss(logits, label)
    assert together.item() == pytest.approx(loss(logits.view(1, 1, 3, 64), label.view(1, 1, 3, 64)).item(), rel=1e-5)
    assert together.item() != pytest.approx(np.mean([loss(*one).item() for one in zip(logits, label, strict=True)]))


def test_gradient_equals_numerical_one():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=12), (rng.random(12) > 0.5).astype(float)
    tensor = torch.tensor(logits, requires_grad=True)
    CombinedIoULoss(0.3)(tensor, torch.tensor(label)).backward()
    for i in range(12):
        step = np.eye(12)[i] * 1e-5
        slope = (by_numpy(logits + step, label, 0.3) - by_numpy(logits - step, label, 0.3)) / 2e-5
        assert tensor.grad[i].item() == pytest.approx(slope, rel=1e-4)


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
    assert loss.item() == pytest.approx(by_numpy(np.full(90000, 2.0), np.ones(90000), 0.0), rel=1e-4)
