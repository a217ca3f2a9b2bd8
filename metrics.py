"""Scores from counts over a whole split, never averaged over batches; and the log that keeps them."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.tracking.context.registry import resolve_tags
from PIL import Image
from torch import Tensor, distributed
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from dataset import written_whole

IGNORED = 255  # of a label, as in dataset.py
STEP, MOST = 20, 160  # thresholds a unit of the logit, and how many there are on either side of 0


class ChangeMetrics:
    """Pixel counts of each class, gathered on the device, and the scores that follow from them, at any threshold.

    With one class positive, the others negative, from the counts TP, FP, FN over everything seen since `reset`:

        dice (= F1)  2·TP / (2·TP + FP + FN)        precision  TP / (TP + FP)
        iou          TP / (TP + FP + FN)            recall     TP / (TP + FN)
        accuracy     the share of the pixels that are given their class

    `dice`, `iou`, `precision` and `recall` are of the change class; of several, the mean over those in the label, and
    `iou_1`, `dice_1`, … are each one's. `mean_dice` and `mean_iou` are means over all classes, unchanged too. A score
    whose denominator is 0 is 1 where the class is neither in the label nor predicted, 0 otherwise.

    What is kept is a histogram, not the probabilities: there are 321 thresholds, evenly spaced over the logits from -8
    to 8, not over the probabilities, which crowd at 0 and 1. The middle one is a probability of 0.5.

    Args:
        num_classes: classes of change, K.
    """

    LOGITS = torch.arange(-MOST, MOST + 1) / STEP

    def __init__(self, num_classes: int = 1) -> None:
        self.num_classes = num_classes
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        # Pixels by likeliest class of change, label, and how many thresholds they passed; moves to the logits' device.
        self._counts = torch.zeros(self.num_classes, 1 + self.num_classes, len(self.LOGITS) + 1, dtype=torch.int64)

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Count a batch. No host sync.

        Args:
            logits: float (N, K, H, W), as in `CombinedIoULoss`; NaN counts as below all thresholds.
            label: (N, 1, H, W) in {0, …, K}, on the same device; pixels of 255 count nowhere.
        """
        logits = logits.detach().float().nan_to_num(nan=-torch.inf)
        change, kind = logits, 0
        if self.num_classes > 1:
            change, kind = logits.logsumexp(1, keepdim=True), logits.argmax(1, keepdim=True)
        passed = (change * STEP).ceil_().clamp_(-MOST, MOST + 1).add_(MOST).long()
        counted, label = (label != IGNORED).long(), label.long()
        cells = (kind * (1 + self.num_classes) + label * counted) * (len(self.LOGITS) + 1) + passed
        self._counts = self._counts.to(logits.device, non_blocking=True)
        self._counts.view(-1).index_add_(0, cells.flatten(), counted.flatten())

    def compute(self, threshold: float = 0.5) -> dict[str, float]:
        """The scores as plain floats in 0..1; one host sync.

        Under torchrun all processes call this together, and have the scores of what all have seen.

        Args:
            threshold: a pixel counts as changed where change is likelier than the nearest of the thresholds to this,
                and then as its likeliest class.

        Raises:
            ValueError: nothing was counted yet.
        """
        return _scores(self.confusion(threshold))

    def confusion(self, threshold: float = 0.5) -> np.ndarray:
        """Pixels as (predicted, labelled), float64 (1 + K, 1 + K), at a threshold as in `compute`."""
        nearest = int((self.LOGITS.double().sigmoid() - threshold).abs().argmin())
        passed, all_pixels = self._passed()[[1 + nearest, 0]]
        return np.vstack([(all_pixels - passed).sum(0), passed])

    def curve(self) -> dict[str, np.ndarray]:
        """The precision-recall curve: `threshold`, `precision`, `recall` and `iou`, float64 (322,) each.

        The thresholds are probabilities and rise from 0, where everything counts as changed. Where nothing is
        predicted any more, precision is 1. Of several classes, precision and recall are of all pixels that changed,
        right where the class is, and `iou` is the mean.
        """
        passed = self._passed()
        tp, predicted, labelled = passed.diagonal(1, 1, 2), passed.sum(2), passed[0, :, 1:].sum(0)
        return {
            "threshold": np.concatenate([[0.0], self.LOGITS.double().sigmoid().numpy()]),
            "precision": np.where(predicted.any(1), tp.sum(1) / np.maximum(predicted.sum(1), 1), 1.0),
            "recall": tp.sum(1) / np.maximum(labelled.sum(), 1),
            "iou": _mean_of_labelled(tp / np.maximum(predicted + labelled - tp, 1), labelled),
        }

    def average_precision(self) -> float:
        """Precision averaged over the steps in recall, 0..1, as scikit-learn's; 0 where nothing is labelled."""
        curve = self.curve()
        return float(-np.diff(curve["recall"], append=0.0) @ curve["precision"])

    def best_threshold(self) -> float:
        """The probability at which IoU is highest; of equals, the nearest to 0.5."""
        curve = self.curve()
        threshold, iou = curve["threshold"][1:], curve["iou"][1:]
        return float(threshold[np.lexsort([np.abs(threshold - 0.5), -iou])[0]])

    def _passed(self) -> np.ndarray:
        """Pixels by likeliest class of change and label, float64 (322, K, 1 + K): all, then those above each step."""
        counts = self._counts.cpu().clone()  # the one host sync
        if distributed.is_initialized():
            distributed.all_reduce(counts)  # on the CPU: who got no batch has its counts there
        if not counts.any():
            raise ValueError("no pixels were counted: call update first")
        return counts.double().flip(2).cumsum(2).flip(2).movedim(2, 0).numpy()


def as_logits(probability: Tensor) -> Tensor:
    """(N, K, H, W), as the metrics take it, of such probabilities; of (K, H, W) or (H, W), N, or N and K, is 1."""
    probability = probability[(None,) * (4 - probability.ndim)]
    unchanged = (1 - probability.sum(1, keepdim=True)).clamp(min=1e-8)  # else several classes tie at infinity
    return (probability / unchanged).clamp(min=1e-8).log()  # finite, so that the loss is


def as_classes(logits: Tensor) -> Tensor:
    """uint8 (N, H, W) of logits (N, K, H, W): 0, or the likeliest class where change is likelier than 0.5."""
    return ((logits.logsumexp(1) > 0) * (1 + logits.argmax(1))).byte()


def object_scores(matched: int, labelled: int, predicted: int) -> dict[str, float]:
    """Precision, recall and F1 of so many objects, and the counts; a score of nothing at all is 1."""
    shares = {"object_precision": (matched, predicted), "object_recall": (matched, labelled),
              "object_f1": (2 * matched, predicted + labelled)}  # fmt: skip
    scores = {
        name: part / whole if whole else float(labelled + predicted == 0) for name, (part, whole) in shares.items()
    }
    return scores | {"objects_labelled": labelled, "objects_predicted": predicted, "objects_matched": matched}


def as_table(rows: dict[str, dict[str, float]]) -> str:
    """Scores by row name as text of 80 columns, Dice under its other name, F1; two more columns a class of several."""
    names = [name.replace("dice", "F1").replace("iou", "IoU").replace("_", " ") for name in next(iter(rows.values()))]
    lines = [["", *names], *([title, *(f"{value:.4f}" for value in row.values())] for title, row in rows.items())]
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return "\n".join("".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)


def _mean_of_labelled(scores: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """The mean over the last axis, classes; of those that are labelled, if any are."""
    return scores[..., labelled > 0].mean(-1) if labelled.any() else scores.mean(-1)


def _scores(confusion: np.ndarray) -> dict[str, float]:
    """The scores of pixel counts (predicted, labelled)."""
    tp, predicted, labelled = confusion.diagonal(), confusion.sum(1), confusion.sum(0)

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.where(whole > 0, part / np.maximum(whole, 1), predicted + labelled == 0)

    dice, iou = share(2 * tp, predicted + labelled), share(tp, predicted + labelled - tp)
    scores = {
        "dice": _mean_of_labelled(dice[1:], labelled[1:]),
        "iou": _mean_of_labelled(iou[1:], labelled[1:]),
        "precision": _mean_of_labelled(share(tp, predicted)[1:], labelled[1:]),
        "recall": _mean_of_labelled(share(tp, labelled)[1:], labelled[1:]),
        "accuracy": tp.sum() / confusion.sum(),
        "mean_dice": dice.mean(),
        "mean_iou": iou.mean(),
    }
    if len(tp) > 2:
        scores |= {f"{name}_{i}": value[i] for name, value in (("dice", dice), ("iou", iou)) for i in range(1, len(tp))}
    return {name: float(value) for name, value in scores.items()}


class ScoreLog:
    """What a run writes about its scores: metrics.csv, TensorBoard's events, and a run of MLflow's.

    As a context it tells MLflow how the run ended.

    Args:
        folder: the run's.
        record: plain values that describe the run: `constants`, `id`, `demo`, `git`, and by split the fingerprints of
            its `data`.
        rows: the scores of the epochs that are done; what was logged of later ones is dropped.

    Raises:
        OSError: something can't be written.
    """

    def __init__(self, folder: Path, record: dict, rows: Sequence[dict[str, float]] = ()):
        self.folder, self.record, self.rows = folder, record, list(rows)
        self._writers: dict[str, SummaryWriter] = {}
        self._scores: dict[str, float] = {}

    def __enter__(self) -> ScoreLog:
        """Take up the files as they were after the last of the rows."""
        is_new = not any(self.folder.glob("events*"))
        self._write_rows()
        writer = self._writer("", int(self.rows[-1]["step"]) + 1 if self.rows else 1)
        if is_new:
            writer.add_text("constants", f"```\n{json.dumps(self.record, indent=2)}\n```")
            writer.flush()
        self._mlflow = MLflowRun(self.folder.name, self.record)
        return self

    def send(self) -> None:
        """Let MLflow have the epochs up to here, now that they are saved."""
        self._mlflow.send(self.rows)

    def step(self, step: int, **values: float) -> None:
        """Take in the loss and the learning rate of a step, for TensorBoard."""
        for name, value in values.items():
            self._writer("").add_scalar(f"steps/{name}", value, step)

    def epoch(self, row: dict[str, float], picture: Path | None = None) -> None:
        """Take in the next epoch's scores and picture, for the table and TensorBoard; `send` tells MLflow.

        In TensorBoard train and val are two runs, so that both are drawn in one chart.
        """
        self.rows.append({name: float(value) for name, value in row.items()})  # what a checkpoint may hold
        self._write_rows()
        epoch = len(self.rows)
        for name, value in row.items():
            split, _, score = name.partition("_")
            if split in ("train", "val"):
                section = "" if score in ("iou", "loss") else "more/"
                self._writer(split, epoch).add_scalar(section + score, value, epoch)
        if picture:
            pixels = np.asarray(Image.open(picture).convert("RGB"))
            self._writer("val", epoch).add_image("predictions", pixels, epoch, dataformats="HWC")
        for writer in self._writers.values():
            writer.flush()

    def scores(self, split: str, scores: dict[str, float]) -> None:
        """Take in scores that the run ends with, of a split, or of "val_best", the best epoch's validation."""
        self._scores |= (scores := {f"{split}/{name}": value for name, value in scores.items()})
        self._mlflow.scores = self._scores
        lines = [f"| {name} | {value:.4f} |" for name, value in scores.items()]
        self._writer("").add_text(f"scores, {split}", "\n".join(["| score | |", "|---|---|", *lines]))

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        status = "FINISHED" if error is None else "FAILED" if issubclass(error, Exception) else "KILLED"
        # Who kills a run doesn't wait for its files; RESUME sends them.
        patterns = () if status == "KILLED" else ("best.pt", "*.json", "*.csv", "*.png", "predictions")
        self._mlflow.end(self.rows, status, [file for pattern in patterns for file in self.folder.glob(pattern)])
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():  # the first error is the one to tell
            if error is None:
                self._write_hparams()
            for writer in self._writers.values():
                writer.close()

    def _writer(self, part: str, purge_step: int | None = None) -> SummaryWriter:
        """TensorBoard's, of this folder or of one in it; what a killed run wrote from `purge_step` on is dropped."""
        if part not in self._writers:
            self._writers[part] = SummaryWriter(self.folder / part, purge_step=purge_step)
        return self._writers[part]

    def _write_hparams(self) -> None:
        """The constants beside the scores that runs are compared by, for TensorBoard's table of runs."""
        finals = {name: value for name, value in self._scores.items() if name.endswith(("/iou", "/dice"))}
        constants = {name: value if value is not None else "None" for name, value in self.record["constants"].items()}
        writer = self._writer("")
        for summary in hparams(constants, finals):
            writer.file_writer.add_summary(summary)
        for name, value in finals.items():
            writer.add_scalar(name, value)

    def _write_rows(self) -> None:
        if not self.rows:
            return (self.folder / "metrics.csv").unlink(missing_ok=True)
        rows = [
            {"epoch": epoch, **{name: f"{value:.6g}" for name, value in row.items()}}
            for epoch, row in enumerate(self.rows, 1)
        ]
        with written_whole(self.folder / "metrics.csv") as file:
            table = csv.DictWriter(file, dict.fromkeys(itertools.chain(*rows)))
            table.writeheader()
            table.writerows(rows)


class MLflowRun:
    """A run's twin in MLflow. What can't be sent is sent later: after a minute, at the end, or when the run goes on.

    Args:
        name: what MLflow calls the run.
        record: as in `ScoreLog`; the tag `id` finds the run again.
    """

    EXPERIMENT = "LEVIRCD-FusionUNet"

    def __init__(self, name: str, record: dict):
        self.name, self.record, self.scores = name, record, {}
        self._run_id: str | None = None
        self._sent = 0  # epochs
        self._is_away, self._not_before = False, 0.0  # seconds
        # Ctrl-C reaches the main thread alone: in it, a write that is cut off would keep mlflow.db locked.
        self._sender = ThreadPoolExecutor(max_workers=1)
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # what fails is told in one line
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds; MLflow's own are 120, seven times over
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def send(self, rows: Sequence[dict[str, float]]) -> None:
        """Send the epochs that MLflow lacks, one request each; not within a minute of a failure."""
        if time.monotonic() < self._not_before:
            return
        if (lacks := self._sender.submit(self._failure, rows).result()) and not self._is_away:
            tqdm.write(f"MLflow doesn't answer ({lacks}); the run goes on, and what MLflow lacks is sent later")
            self._is_away = True

    def end(self, rows: Sequence[dict[str, float]], status: str, files: Sequence[Path]) -> None:
        """Send what is missing, the scores that the run ends with, its files, and how it ended."""
        if lacks := self._sender.submit(self._failure, rows, status, files).result():
            again = "EVALUATE once more" if self.record["constants"].get("EVALUATE") else f"RESUME=runs/{self.name}"
            tqdm.write(f"MLflow lacks a part of this run ({lacks}); {again} sends it")

    def _failure(self, rows: Sequence[dict], status: str | None = None, files: Sequence[Path] = ()) -> str | None:
        """Send; in a few words, why it failed."""
        start = time.monotonic()
        try:
            client = _mlflow_client()
            if self._run_id is None:
                self._take_up(client)
            for step, row in enumerate(rows[self._sent :], self._sent + 1):
                self._log(client, {sectioned(name): value for name, value in row.items()}, step)
                self._sent = step
            if status:
                has = client.get_run(self._run_id).data.metrics
                lacking = {name: value for name, value in self.scores.items() if has.get(name) != value}
                self._log(client, lacking, len(rows))
                for file in files:
                    client.log_artifact(self._run_id, str(file))
                client.set_terminated(self._run_id, status)
        except Exception as error:  # whatever is wrong with it, it is not worth a run
            self._not_before = time.monotonic() + 60
            return str(getattr(error.__cause__, "orig", error)).partition("\n")[0][:200]
        if self._is_away:
            tqdm.write("MLflow is back and has what it lacked")
        self._is_away = False
        self._not_before = time.monotonic() + 5 * (time.monotonic() - start)  # a slow one gets a sixth of the time
        return None

    def _log(self, client: MlflowClient, row: dict[str, float], step: int) -> None:
        now = int(1000 * time.time())
        client.log_batch(self._run_id, [Metric(name, value, now, step) for name, value in row.items()])

    def _take_up(self, client: MlflowClient) -> None:
        """Find the run, or make it as `mlflow.start_run` and `mlflow.log_input` do; see which epochs it has."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or self.EXPERIMENT
        experiment = client.get_experiment_by_name(name)
        if experiment and experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        where = experiment.experiment_id if experiment else client.create_experiment(name)
        constants = self.record["constants"]
        if found := client.search_runs([where], f"tags.id = '{self.record['id']}'"):
            run = found[0]
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            tags = resolve_tags({name: str(self.record[name]) for name in ("id", "demo", "git")})
            run = client.create_run(where, run_name=os.environ.get("MLFLOW_RUN_NAME") or self.name, tags=tags)
            source = str(Path(constants["DATA_DIR"]).resolve())
            inputs = [
                DatasetInput(
                    Dataset(f"{constants['DATA_DIR']} {split}", digest, "local", json.dumps({"uri": source})),
                    [InputTag("mlflow.data.context", split)],
                )
                for split, digest in self.record["data"].items()
            ]
            client.log_inputs(run.info.run_id, datasets=inputs)
        place = Path(run.info.artifact_uri.removeprefix("file://"))
        if place.is_absolute() and not os.environ.get("MLFLOW_TRACKING_URI") and Path.cwd() not in place.parents:
            tqdm.write(
                f"MLflow keeps files in {place.parent.parent}, where mlflow.db was made: remove or rename mlflow.db"
            )
        logged = run.data.params
        missing = [Param(name, str(value)) for name, value in constants.items() if name not in logged]
        client.log_batch(run.info.run_id, params=missing)
        for name in logged.keys() & constants.keys():  # MLflow lets no parameter change: raised EPOCHS become a tag
            if logged[name] != str(constants[name]):
                client.set_tag(run.info.run_id, name, constants[name])
        history = client.get_metric_history(run.info.run_id, "train/loss") if found else ()
        self._sent = max((point.step for point in history), default=0)
        self._run_id = run.info.run_id


def sectioned(name: str) -> str:
    """`train_loss` → `train/loss`, as MLflow has a section for each; other names as they are."""
    return name.replace("_", "/", name.startswith(("train_", "val_")))


def _mlflow_client() -> MlflowClient:
    """For the server that MLFLOW_TRACKING_URI names, or mlflow.db, a file that is made whole or not at all.

    MLflow would leave half a database behind where two runs make one together, or one is killed while it does.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not file.exists():
        part = Path(f"{file}.{os.getpid()}.part")
        MlflowClient(f"sqlite:///{part}")
        with contextlib.suppress(FileExistsError):  # another run was first
            os.link(part, file)
        part.unlink()
    return MlflowClient(uri)
