"""The folders of runs/: what a run records there, sends to TensorBoard and MLflow, and takes up again."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data.files import ModelError, read_checkpoint, written_whole
from data.images import DataError


def new_folder(name: str | None) -> Path:
    """A folder of that name in runs/, or named after the second; no two runs get one, even if they start together."""
    while True:
        folder = Path("runs", name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError as error:
            if name:
                raise FileExistsError(f"RUN_NAME={name}: {folder} is there already; name another") from error
            time.sleep(1)


def describe(config: SimpleNamespace, began: dict, device: torch.device, loaders: dict[str, DataLoader]) -> dict:
    """What is recorded of a run; DataError where the data are not those that it began with."""
    commit = f"git -C '{Path(__file__).parent}' describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null"
    packages = ("torchvision", "numpy", "pillow", "matplotlib", "mlflow")
    record = {
        "constants": vars(config) | {"RESUME": None},
        "demo": began["demo"],
        "id": began.get("id", uuid.uuid4().hex),
        "data": {split: loader.dataset.fingerprint() for split, loader in loaders.items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "git": subprocess.getoutput(f"{commit} || echo unknown"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {package: importlib.metadata.version(package) for package in packages},
    }
    comparable = ("data", "device", "git", "versions")
    differing = [name for name in comparable if began.get(name, record[name]) != record[name]]
    if "data" in differing:
        raise DataError(f"{config.DATA_DIR}: not the files that {config.RESUME} began with; bring those back")
    if differing:
        print(f"{', '.join(differing)}: not as when the run began; its scores may differ in the last digits")
    return record


def last_checkpoint(folder: str | None) -> dict | None:
    """`last.pt` of a run to resume; None where no epoch was finished."""
    if folder is None or not Path(folder, "last.pt").exists():
        return None
    try:
        return read_checkpoint(Path(folder, "last.pt"))
    except ModelError as error:
        best, usable = Path(folder, "best.pt"), "without it RESUME begins with the first epoch"
        with contextlib.suppress(ModelError):
            usable += f", and {best}, of epoch {read_checkpoint(best)['epoch']}, is whole"
        raise ModelError(f"{str(error).partition(';')[0]}; {usable}") from error


class RunLog:
    """What a run writes about itself: metrics.csv, TensorBoard's events, and a run of MLflow's.

    As a context it keeps other processes away from the run's folder, and tells MLflow how the run ended.

    Args:
        folder: the run's.
        record: plain values that describe the run, kept as constants.json; `constants`, `id`, `demo` and `git` are
            MLflow's parameters and tags too.
        rows: the scores of the epochs that are done; what was logged of later ones is dropped.

    Raises:
        OSError: something can't be written, or another process is at this run.
    """

    NOT_REPEATABLE = ("train_pairs_per_second", "val_pairs_per_second", "peak_memory_gib")  # hence not in metrics.csv

    def __init__(self, folder: Path, record: dict, rows: Sequence[dict[str, float]] = ()):
        self.folder, self.record, self.rows = folder, record, list(rows)
        self._steps: dict[int, dict[str, float]] = {}  # what MLflow shall have

    def __enter__(self) -> RunLog:
        """Take hold of the folder and write the record into it."""
        self._lock = filelock.FileLock(self.folder / ".lock", blocking=False)
        try:
            self._lock.acquire()
        except filelock.Timeout as error:
            raise OSError(f"{self.folder}: another process is at this run; wait for its end") from error
        for part in self.folder.glob("*.part"):  # left by a process that was killed
            part.unlink()
        text = json.dumps(self.record, indent=2) + "\n"
        is_new = not (self.folder / "constants.json").exists()
        with written_whole(self.folder / "constants.json") as file:
            file.write(text)
        self._write_rows()
        self._writer = SummaryWriter(self.folder, purge_step=len(self.rows) + 1)
        if is_new:
            self._writer.add_text("constants", f"```\n{text}```")
            self._writer.flush()
        self._mlflow = MLflowRun(self.folder.name, self.record)
        return self

    def send(self, timeout: float = 0) -> None:
        """Let MLflow have the epochs up to here, now that they are saved; waits at most `timeout` seconds for it."""
        self._steps = dict(enumerate(self.rows, 1))
        self._mlflow.send(self._steps, timeout)

    def epoch(self, row: dict[str, float], predictions: Path) -> None:
        """Take in the next epoch's scores and picture, for the table and TensorBoard; `send` tells MLflow."""
        self.rows.append(row)
        self._write_rows()
        for name, value in row.items():
            self._writer.add_scalar(name.replace("_", "/", name.startswith(("train_", "val_"))), value, len(self.rows))
        picture = np.asarray(Image.open(predictions).convert("RGB"))
        self._writer.add_image("predictions", picture, len(self.rows), dataformats="HWC")
        self._writer.flush()

    def scores(self, scores: dict[str, float]) -> None:
        """Take in the scores that the run ends with, named `split_score`; their step follows the last epoch's."""
        step = len(self.rows) + 1
        self._steps = self._steps | {step: scores}  # not changed, as the thread may be at it
        for name, value in scores.items():
            self._writer.add_scalar(name.replace("_", "/", 1), value, step)
        self._writer.flush()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        status = "FINISHED" if error is None else "FAILED" if issubclass(error, Exception) else "KILLED"
        # Who kills a run doesn't wait for its files; RESUME sends them.
        patterns = () if status == "KILLED" else ("best.pt", "*.json", "*.csv", "*.png", "predictions")
        self._mlflow.end(self._steps, status, [file for pattern in patterns for file in self.folder.glob(pattern)])
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():  # the first error is the one to tell
            self._writer.close()
        self._lock.release()

    def _write_rows(self) -> None:
        if not self.rows:
            return (self.folder / "metrics.csv").unlink(missing_ok=True)
        rows = [{"epoch": epoch, **row} for epoch, row in enumerate(self.rows, 1)]
        columns = [name for name in rows[0] if name not in self.NOT_REPEATABLE]
        with written_whole(self.folder / "metrics.csv") as file:
            table = csv.DictWriter(file, columns, extrasaction="ignore")
            table.writeheader()
            table.writerows(rows)


class MLflowRun:
    """A run's twin in MLflow, brought up to date by a thread: a server that is slow or away stops no training.

    It asks what MLflow has and sends what is missing. So nothing is lost and nothing is there twice, however often
    the server goes away or the run is resumed.

    Args:
        name: what MLflow calls the run.
        record: as in `RunLog`; the tag `id` finds the run again.
    """

    EXPERIMENT = "LEVIRCD-FusionUNet"

    def __init__(self, name: str, record: dict):
        self.name, self.record = name, record
        self._run_id: str | None = None
        self._times: dict[int, int] = {}  # milliseconds, by step
        self._is_away = False
        self._thread = ThreadPoolExecutor(1)
        self._sending: Future | None = None
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds; MLflow's own are 120, seven times over
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the next epoch tries again

    def send(self, steps: dict[int, dict[str, float]], timeout: float = 0) -> None:
        """Bring MLflow up to date, if it isn't still at it since the last time; waits at most `timeout` seconds."""
        if self._sending is None or self._sending.done():
            self._sending = self._thread.submit(self._send, steps)
        wait([self._sending], timeout)

    def end(self, steps: dict[int, dict[str, float]], status: str, files: Sequence[Path]) -> None:
        """Bring MLflow up to date for the last time, with how the run ended and its files; waits until that is done."""
        self._thread.submit(self._send, steps, status, files)
        self._thread.shutdown()

    def _send(self, steps: dict[int, dict[str, float]], status: str | None = None, files: Sequence[Path] = ()) -> None:
        try:
            client = _mlflow_client()
            if self._run_id is None:
                self._run_id = self._find_or_create(client).info.run_id
            has: dict[str, set[int]] = {}
            for step, row in steps.items():
                name = next(iter(row))
                now = self._times.setdefault(step, int(1000 * time.time()))  # a point sent twice is one point
                if name not in has:
                    has[name] = {point.step for point in client.get_metric_history(self._run_id, name)}
                if step not in has[name]:
                    client.log_batch(self._run_id, [Metric(key, value, now, step) for key, value in row.items()])
            if status:
                client.set_terminated(self._run_id, status)
            for file in files:
                client.log_artifact(self._run_id, str(file))
        except Exception as error:  # whatever is wrong with it, it is not worth a run
            reason = str(error).partition("\n")[0][:200]
            if status:
                again = "EVALUATE once more" if self.record["constants"].get("EVALUATE") else f"RESUME=runs/{self.name}"
                tqdm.write(f"MLflow lacks a part of this run ({reason}); {again} sends it")
            elif not self._is_away:
                tqdm.write(f"MLflow doesn't answer ({reason}); the run goes on, and what MLflow lacks is sent later")
            self._is_away = True
        else:
            if self._is_away:
                tqdm.write("MLflow is back and has what it lacked")
            self._is_away = False

    def _find_or_create(self, client: MlflowClient) -> Run:
        experiment = client.get_experiment_by_name(self.EXPERIMENT)
        where = experiment.experiment_id if experiment else client.create_experiment(self.EXPERIMENT)
        found = client.search_runs([where], f"tags.id = '{self.record['id']}'")
        tags = {name: str(self.record[name]) for name in ("id", "demo", "git")}
        run = found[0] if found else client.create_run(where, run_name=self.name, tags=tags)
        client.update_run(run.info.run_id, status="RUNNING")
        constants, logged = self.record["constants"], run.data.params
        missing = [Param(name, str(value)) for name, value in constants.items() if name not in logged]
        client.log_batch(run.info.run_id, params=missing)
        for name in logged.keys() & constants.keys():  # MLflow lets no parameter change: raised EPOCHS become a tag
            if logged[name] != str(constants[name]):
                client.set_tag(run.info.run_id, name, constants[name])
        return run


def _mlflow_client() -> MlflowClient:
    """For the server that MLFLOW_TRACKING_URI names, or mlflow.db, a file that is made whole or not at all.

    MLflow would leave half a database behind where two runs make one together, or one is killed while it does.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not file.exists():
        with filelock.FileLock(f"{file}.lock"):
            if not file.exists():
                part = Path(f"{file}.part")
                part.unlink(missing_ok=True)
                MlflowClient(f"sqlite:///{part}")
                os.replace(part, file)
    return MlflowClient(uri)
