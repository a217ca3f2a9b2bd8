"""Pictures of what a model predicts. Reads only the pairs that it draws."""

from __future__ import annotations

import os

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch.utils.data import Dataset

from model import FusionUNet

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/): told apart with any kind of colour vision.
OUTCOMES = {"hit": "#56b4e9", "missed": "#d55e00", "false alarm": "#f0e442"}
COLUMNS = ("before", "after", "truth", "prediction", "errors")
CELL = 2.2  # inches, a side


def plot_predictions(
    model: FusionUNet,
    dataset: Dataset,
    device: str | torch.device = "cuda",
    num_samples: int = 10,
    path: str | os.PathLike | None = "results.png",
) -> Figure:
    """Draw a row for each of a few pairs: before, after, truth, prediction, and where the two differ.

    The model's mode and device are left as they were.

    Args:
        model: the detector.
        dataset: gives (uint8 (3, H, W), uint8 (3, H, W), uint8 (1, H, W) in {0, 1}) at an index.
        device: where to predict.
        num_samples: rows, spread evenly over the data set; all of it where it holds fewer.
        path: PNG to write, its folder made where missing; None writes nothing.

    Returns:
        The figure, closed for pyplot, so that a notebook shows it once: as the value of its cell.

    Raises:
        ValueError: num_samples is below 1 or the data set is empty.
        RuntimeError: `device` is a CUDA device and there is none.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError('no CUDA device here: call plot_predictions(..., device="cpu")')
    if num_samples < 1 or len(dataset) < 1:
        raise ValueError(f"nothing to draw: {num_samples} samples of a data set of {len(dataset)}")
    rows = np.unique(np.linspace(0, len(dataset) - 1, num_samples).round().astype(int)).tolist()
    home = next(model.parameters()).device
    model.to(device)
    try:
        figure, grid = plt.subplots(
            len(rows), len(COLUMNS), figsize=(CELL * len(COLUMNS), CELL * len(rows) + 0.6),
            squeeze=False, layout="constrained",
        )  # fmt: skip
        plt.close(figure)
        for axes, index in zip(grid, rows, strict=True):
            image_a, image_b, label = dataset[index]
            truth = label[0].numpy().astype(bool)
            prediction = model.predict(image_a, image_b).numpy() > 0.5
            _draw_row(axes, image_a, image_b, truth, prediction)
            name = dataset.name(index) if hasattr(dataset, "name") else f"{index}"
            axes[0].set_ylabel(name, fontsize=8)
    finally:
        model.to(home)
    for axis, title in zip(grid[0], COLUMNS, strict=True):
        axis.set_title(title, fontsize=11)
    handles = [Patch(facecolor=colour, edgecolor="black", label=name) for name, colour in OUTCOMES.items()]
    figure.legend(handles=handles, loc="outside lower right", ncols=3, frameon=False, fontsize=10)
    if path is not None:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        figure.savefig(path, dpi=100)
    return figure


def _draw_row(
    axes: np.ndarray, image_a: torch.Tensor, image_b: torch.Tensor, truth: np.ndarray, prediction: np.ndarray
) -> None:
    errors = np.zeros((*truth.shape, 3))
    for colour, where in zip(
        OUTCOMES.values(), (truth & prediction, truth & ~prediction, ~truth & prediction), strict=True
    ):
        errors[where] = to_rgb(colour)
    for axis, picture in zip(
        axes,
        (image_a.permute(1, 2, 0).numpy(), image_b.permute(1, 2, 0).numpy(), truth, prediction, errors),
        strict=True,
    ):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
        axis.set_xticks([])
        axis.set_yticks([])
    union = (truth | prediction).sum()
    iou = f"IoU {(truth & prediction).sum() / union:.2f}" if union else "no change, none predicted"
    axes[-1].set_xlabel(iou, fontsize=9)
