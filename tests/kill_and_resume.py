"""Kills runs at random moments, resumes them, and compares what they end with to a run that nobody killed.

    python tests/kill_and_resume.py [KILLS] [SEED]

Each run is a real one, on a few tiny pairs: it is killed with SIGKILL, wherever it is, and taken up again in the same
way until it ends. Its weights and scores must be those of a run that nobody disturbed, but for a twin started together
with it, and each epoch must be in TensorBoard and in MLflow once.
"""

from __future__ import annotations

import csv
import json
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
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import start_main, write_tiny

CONSTANTS = {
    "DATA_DIR": "tiny", "BACKBONE": "resnet18", "WEIGHTS": None, "CROP_SIZE": 64, "BATCH_SIZE": 2, "EPOCHS": 2,
    "DEVICE": "cpu", "WARMUP_EPOCHS": 0.5, "NUM_WORKERS": 0,
}  # fmt: skip


def result(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], str, str]:
    """What must agree to the bit: both checkpoints' weights, metrics.csv but for times, the test split's scores."""
    folder = Path("runs", name)
    last, best = (torch.load(folder / file, weights_only=True)["model"] for file in ("last.pt", "best.pt"))
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{name: value for name, value in row.items() if "second" not in name} for row in csv.DictReader(file)]
    return last, best, json.dumps(rows), (folder / "test_metrics.json").read_text()


def differences(name: str, other: str) -> list[str]:
    """In what two runs differ, and what is wrong with the logs of the first."""
    titles = ("last.pt", "best.pt", "metrics.csv", "test_metrics.json")
    pairs = zip(titles, result(name), result(other), strict=True)
    return [title for title, ours, theirs in pairs if not equal(ours, theirs)] + wrong_steps(name)


def equal(ours: object, theirs: object) -> bool:
    """To the bit, tensors by name too."""
    return ours == theirs if isinstance(ours, str) else all(torch.equal(ours[name], theirs[name]) for name in theirs)


def wrong_steps(name: str) -> list[str]:
    """Where TensorBoard or MLflow lack an epoch of metrics.csv, or have it twice."""
    with open(Path("runs", name, "metrics.csv")) as file:
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
    found = [f"{title}: steps {steps}" for title, steps in logged.items() if steps != epochs]
    return found + ([f"MLflow: {run.info.status}"] if run.info.status != "FINISHED" else [])


def kill_and_resume(kills: int, seed: int = 0, **constants: object) -> list[str]:
    """Kill a run again and again, in the working folder; the differences found, none if all is well."""
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd()}/mlflow.db")
    write_tiny(Path("tiny"))
    constants = CONSTANTS | constants
    whole = [start_main(RUN_NAME=name, **constants) for name in ("whole", "twin")]
    while not Path("runs").exists() and whole[0].is_alive():
        time.sleep(0.01)
    began = time.monotonic()
    for process in whole:
        process.join()
        assert process.exitcode == 0, Path("output.txt").read_text()
    duration = (time.monotonic() - began) / 2  # of one that has the machine for itself
    found = [f"twin: {difference}" for difference in differences("twin", "whole") + wrong_steps("whole")]
    rng, number, left = np.random.default_rng(seed), 0, kills
    with tqdm(total=kills, unit="kill", disable=None) as bar:
        while left:
            number += 1
            name, moments = f"killed_{number}", []
            while True:
                known = Path("runs", name, "constants.json").exists()  # else it was killed before there was a run
                first = constants | {"RUN_NAME": name, "NUM_WORKERS": number % 2}
                process = start_main(**{"RESUME": f"runs/{name}"} if known else first)
                delay = rng.uniform(0, duration) if left else None
                process.join(delay)
                if process.exitcode is not None:
                    break
                process.kill()
                process.join()
                moments.append(round(delay, 2))
                left -= 1
                bar.update()
                if not known and not Path("runs", name, "constants.json").exists() and Path("runs", name).exists():
                    shutil.rmtree(Path("runs", name))
            wrong = [f"exit code {process.exitcode}"] * (process.exitcode != 0) or differences(name, "whole")
            tqdm.write(f"{name}: killed after {moments or 'no'} seconds, then {', '.join(wrong) or 'equal'}")
            found += wrong
            left = 0 if wrong else left
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
        found = kill_and_resume(kills, *map(int, sys.argv[2:]))
        print(Path("output.txt").read_text() if found else f"{kills} kills, every resumed run equal to the bit")
        sys.exit(bool(found))
