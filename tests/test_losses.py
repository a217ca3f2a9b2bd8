"""CombinedIoULoss against values worked by hand and NumPy's differences."""

import math

import numpy as np
import pytest
import torch

from losses import CombinedIoULoss


def by_numpy(logits: np.ndarray, label: np.ndarray, alpha: float) -> float:
    """The docstring's formula in float64, for logits (K, pixels) and label (pixels,)."""
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


def test_iou_is_of_the_whole_batch():
    logits, label = torch.randn(3, 1, 8, 8), torch.rand(3, 1, 8, 8) > 0.7
    loss = CombinedIoULoss(0.0)
    together = loss(logits, label)
    assert together.item() == pytest.approx(loss(logits.view(1, 1, 3, 64), label.view(1, 1, 3, 64)).item(), rel=1e-5)
    assert together.item() != pytest.approx(
        np.mean([loss(*one).item() for one in zip(logits.split(1), label.split(1), strict=True)])
    )


@pytest.mark.parametrize("classes", [1, 3])
def test_value_and_gradient_equal_numerical_ones(classes):
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(classes, 12)), rng.integers(0, 1 + classes, 12)
    tensor = torch.tensor(logits.reshape(1, classes, 3, 4), requires_grad=True)
    loss = CombinedIoULoss(0.3)(tensor, torch.tensor(label.reshape(1, 1, 3, 4)))
    loss.backward()
    assert loss.item() == pytest.approx(by_numpy(logits, label, 0.3), rel=1e-5)
    for i in range(logits.size):
        step = np.eye(logits.size)[i].reshape(logits.shape) * 1e-5
        slope = (by_numpy(logits + step, label, 0.3) - by_numpy(logits - step, label, 0.3)) / 2e-5
        assert tensor.grad.flatten()[i].item() == pytest.approx(slope, rel=1e-4)


def test_one_class_is_binary_cross_entropy():
    logits, label = 5 * torch.randn(2, 1, 8, 8), torch.rand(2, 1, 8, 8) > 0.7
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, label.float())
    assert CombinedIoULoss(1.0)(logits, label).item() == pytest.approx(expected.item(), rel=1e-5)


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


@pytest.mark.parametrize("classes", [1, 3])
def test_ignored_pixels_count_nowhere(classes):
    rng = np.random.default_rng(1)
    logits, label = rng.normal(size=(classes, 40)), rng.integers(0, 1 + classes, 40)
    ignored = rng.random(40) < 0.4
    given = torch.tensor(logits.reshape(1, classes, 5, 8), requires_grad=True)
    loss = CombinedIoULoss(0.3)(given, torch.tensor(np.where(ignored, 255, label).reshape(1, 1, 5, 8)))
    loss.backward()
    assert loss.item() == pytest.approx(by_numpy(logits[:, ~ignored], label[~ignored], 0.3), rel=1e-5)
    pulled = given.grad.reshape(classes, 40).abs().sum(0).numpy() > 0
    assert not pulled[ignored].any() and pulled[~ignored].all()


def test_a_batch_of_ignored_pixels_alone_teaches_nothing():
    logits = torch.randn(1, 1, 4, 4, requires_grad=True)
    CombinedIoULoss()(logits, torch.full((1, 1, 4, 4), 255)).backward()
    assert not logits.grad.any()
