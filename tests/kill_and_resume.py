"""Kills runs at random moments, resumes them, and compares their results with those of a run that nobody killed.

    python tests/kill_and_resume.py [KILLS] [SEED]

Each run is a real one, on a few tiny pairs. It is killed with SIGKILL, wherever it is, and resumed until it ends. Its
weights and scores must equal those of an undisturbed run to the bit, and TensorBoard and MLflow hold each epoch once.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import start_main, write_tiny

CONSTANTS = {
    "DATA_DIR": "tiny", "BACKBONE": "resnet18", "WEIGHTS": None, "CROP_SIZE": 64, "BATCH_SIZE": 2, "EPOCHS": 2,
    "DEVICE": "cpu", "WARMUP_EPOCHS": 0.5, "NUM_WORKERS": 0,
}  # fmt: skip


def results(name: str) -> dict[str, object]:
    """What must be equal to the bit, by the file that holds it."""
    folder = Path("runs", name)
    found: dict[str, object] = {"test_metrics.json": (folder / "test_metrics.json").read_text()}
    for file in ("last.pt", "best.pt"):
        weights = torch.load(folder / file, weights_only=True)["model"]
        found[file] = {key: tensor.numpy().tobytes() for key, tensor in weights.items()}
    with open(folder / "metrics.csv", newline="") as file:  # but for times
        found["metrics.csv"] = [
            [row[key] for key in row if key != "time" and "second" not in key] for row in csv.DictReader(file)
        ]
    return found


def differences(name: str, other: str) -> list[str]:
    """The files in which two runs differ, and what is wrong with the logs of the first."""
    ours, theirs = results(name), results(other)
    return [file for file in ours if ours[file] != theirs[file]] + wrong_steps(name)


def wrong_steps(name: str) -> list[str]:
    """Where TensorBoard or MLflow lack an epoch of metrics.csv or have it twice, and MLflow's status if unfinished."""
    with open(Path("runs", name, "metrics.csv"), newline="") as file:
        epochs = [int(row["epoch"]) for row in csv.DictReader(file)]
    logged = {}
    for split in ("train", "val"):
        events = EventAccumulator(f"runs/{name}/{split}", {"images": 0}).Reload()
        logged[f"TensorBoard, {split}"] = [event.step for event in events.Scalars("iou")]
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("LEVIRCD-FusionUNet").experiment_id
    record = json.loads(Path("runs", name, "constants.json").read_text())
    (run,) = client.search_runs([experiment], f"tags.id = '{record['id']}'")
    logged["MLflow"] = [point.step for point in client.get_metric_history(run.info.run_id, "val/iou")]
    found = [f"{log}: steps {steps}" for log, steps in logged.items() if steps != epochs]
    return found + ([f"MLflow: {run.info.status}"] if run.info.status != "FINISHED" else [])


def start(name: str, workers: int = 0) -> multiprocessing.Process:
    """Start a run, or resume it if an earlier process got as far as recording its constants."""
    folder = Path("runs", name)
    if (folder / "constants.json").exists():
        return start_main(RESUME=folder)
    shutil.rmtree(folder, ignore_errors=True)
    return start_main(**CONSTANTS | {"RUN_NAME": name, "NUM_WORKERS": workers})


def kill_and_resume(kills: int = 20, seed: int = 0) -> list[str]:
    """Kill and resume runs in the working folder, `kills` times in all; returns the differences found."""
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd()}/mlflow.db")
    write_tiny(Path("tiny"))
    undisturbed = [start(name) for name in ("whole", "twin")]  # at once: neither may disturb the other
    while not Path("runs").exists() and undisturbed[0].is_alive():  # the imports are no part of a run's duration
        time.sleep(0.01)
    started = time.monotonic()
    for process in undisturbed:
        process.join()
        assert process.exitcode == 0, Path("output.txt").read_text()
    duration = (time.monotonic() - started) / 2  # seconds, of one run alone
    found = wrong_steps("whole") + differences("twin", "whole")

    rng, number = np.random.default_rng(seed), 0
    while kills and not found:
        number += 1
        name = f"killed_{number}"
        process = start(name, number % 2)
        process.join(rng.uniform(0, duration))
        while process.is_alive() and kills:
            process.kill()
            process.join()
            kills -= 1
            process = start(name, number % 2)
            process.join(rng.uniform(0, duration) if kills else None)
        found = [f"exit code {process.exitcode}"] if process.exitcode else differences(name, "whole")
        print(f"{name}: {', '.join(found) or 'equal'}; kills left: {kills}", flush=True)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = kill_and_resume(*map(int, sys.argv[1:]))
        print(Path("output.txt").read_text() if found else "all equal to the bit")
        sys.exit(bool(found))
