"""Scores from counts over a whole split, never averaged over batches; objects; and the log of a run's scores."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor, distributed
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from dataset import IGNORED, atomic_write

STEP, MOST = 20, 160  # thresholds per unit of the logit, and how many there are on either side of 0
EXPERIMENT = "LEVIRCD-FusionUNet"  # in MLflow


class ChangeMetrics:
    """Pixel counts of each class, kept on the device, and the scores that follow from them at any threshold.

    For each class, from the counts TP, FP and FN of that class against the others, over everything since `reset`:

        dice (= F1)  2·TP / (2·TP + FP + FN)        precision  TP / (TP + FP)
        iou          TP / (TP + FP + FN)            recall     TP / (TP + FN)
        accuracy     the share of pixels whose class is right

    `dice`, `iou`, `precision` and `recall` are of the change class; with several, the mean over those that are
    labelled, and `iou_1`, `dice_1`, … are of each. `mean_dice` and `mean_iou` are means over all classes, unchanged
    included. A score whose denominator is 0 is 1 if the class is neither labelled nor predicted, else 0.

    What is kept is a histogram over 321 thresholds, evenly spaced over the logits from -8 to 8, since probabilities
    crowd at 0 and 1. The middle one is a probability of 0.5.

    Args:
        num_classes: classes of change, K.
    """

    LOGITS = torch.arange(-MOST, MOST + 1) / STEP

    def __init__(self, num_classes: int = 1) -> None:
        self.num_classes = num_classes
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        # Pixels by likeliest class of change, label and number of thresholds passed; moves to the device of the logits.
        self._counts = torch.zeros(self.num_classes, 1 + self.num_classes, len(self.LOGITS) + 1, dtype=torch.int64)

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Count a batch. No host sync.

        Args:
            logits: float (N, K, H, W), as `FusionUNet` gives them; NaN counts as unchanged.
            label: (N, 1, H, W) in {0, …, K} on the same device; pixels of 255 aren't counted.
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
        """The scores, 0..1; one host sync. Several processes call this together and get the scores of all their counts.

        Args:
            threshold: probability of change above which a pixel counts as its likeliest class; the nearest of the 321.

        Raises:
            ValueError: nothing was counted yet.
        """
        return _scores(self.confusion(threshold))

    def confusion(self, threshold: float = 0.5) -> np.ndarray:
        """Pixels as (predicted, labelled), float64 (1 + K, 1 + K), at a threshold; to be called as `compute`."""
        nearest = int((self.LOGITS.double().sigmoid() - threshold).abs().argmin())
        passed, all_pixels = self._passed()[[1 + nearest, 0]]
        return np.vstack([(all_pixels - passed).sum(0), passed])

    def curve(self) -> dict[str, np.ndarray]:
        """The precision-recall curve: `threshold`, `precision`, `recall` and `iou`, float64 (322,) each.

        Thresholds are probabilities, rising from 0, where everything counts as changed. Precision is 1 where nothing is
        predicted. With several classes, precision and recall are of all changed pixels, right if their class is, and
        `iou` is the mean.
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
        """Average precision as in scikit-learn, 0..1: precision averaged over recall; 0 where nothing is labelled."""
        curve = self.curve()
        return float(-np.diff(curve["recall"], append=0.0) @ curve["precision"])

    def best_threshold(self) -> float:
        """The probability threshold with the highest IoU, ties broken towards 0.5."""
        curve = self.curve()
        threshold, iou = curve["threshold"][1:], curve["iou"][1:]
        return float(threshold[np.lexsort([np.abs(threshold - 0.5), -iou])[0]])

    def _passed(self) -> np.ndarray:
        """Pixels by likeliest class and label, float64 (322, K, 1 + K): all, then those above each threshold."""
        counts = self._counts.cpu().clone()  # the one host sync
        if distributed.is_initialized():
            distributed.all_reduce(counts)  # on the CPU, where those of a process without a batch are
        if not counts.any():
            raise ValueError("no pixels were counted: call update first")
        return counts.double().flip(2).cumsum(2).flip(2).movedim(2, 0).numpy()


def to_classes(probability: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """The class of each pixel, uint8 (H, W), from the probability of each class of change, (H, W) or (K, H, W).

    It is the likeliest class where the probability of any change is above the threshold, else 0.
    """
    if probability.ndim == 2 or len(probability) == 1:
        return (probability.reshape(probability.shape[-2:]) > threshold).view(np.uint8)
    return np.where(probability.sum(0) > threshold, 1 + probability.argmax(0), 0).astype(np.uint8)


def connected_components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 4-connected components of each class.

    Args:
        mask: integers (H, W), 0 for none, else the class.

    Returns:
        int32 (H, W), 0 or the number of a component, from 1; and the class of each, (count,).
    """
    components, classes = np.zeros(mask.shape, np.int32), []
    for kind in range(1, int(mask.max(initial=0)) + 1):
        found, count = ndimage.label(mask == kind)
        components += np.where(found > 0, found + len(classes), 0)
        classes += [kind] * count
    return components, np.array(classes, mask.dtype)


def match_objects(predicted: np.ndarray, label: np.ndarray) -> tuple[int, int, int]:
    """Match the objects of a prediction and of a label: those of one class whose IoU is above 0.5.

    Above 0.5 an object has at most one partner (Kirillov et al. 2019, doi:10.1109/CVPR.2019.00963).

    Args:
        predicted: (H, W), 0 where nothing changed, else the class.
        label: likewise; pixels of 255 count as unchanged in both.

    Returns:
        How many are matched, labelled and predicted.
    """
    valid = label != IGNORED
    predicted, predicted_classes = connected_components(predicted * valid)
    labelled, labelled_classes = connected_components(label * valid)
    both = (predicted > 0) & (labelled > 0)
    (ours, theirs), overlap = np.unique(np.stack([predicted[both], labelled[both]]), axis=1, return_counts=True)
    union = np.bincount(predicted.ravel())[ours] + np.bincount(labelled.ravel())[theirs] - overlap
    is_match = (2 * overlap > union) & (predicted_classes[ours - 1] == labelled_classes[theirs - 1])
    return int(is_match.sum()), len(labelled_classes), len(predicted_classes)


def object_scores(matched: int, labelled: int, predicted: int) -> dict[str, float]:
    """Precision, recall and F1 of so many objects, 0..1, and the counts; 1 where there are no objects at all."""

    def share(part: int, whole: int) -> float:
        return part / whole if whole else float(labelled + predicted == 0)

    return {
        "object_precision": share(matched, predicted),
        "object_recall": share(matched, labelled),
        "object_f1": share(2 * matched, predicted + labelled),
        "objects_labelled": labelled, "objects_predicted": predicted, "objects_matched": matched,
    }  # fmt: skip


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """Scores by row name as a table of text, Dice under its other name, F1."""
    names = [name.replace("dice", "F1").replace("iou", "IoU").replace("_", " ") for name in next(iter(rows.values()))]
    lines = [["", *names], *([title, *(f"{value:.4f}" for value in row.values())] for title, row in rows.items())]
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return "\n".join("".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)


def _mean_of_labelled(scores: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """The mean over the classes on the last axis, of those that are labelled if any are."""
    return scores[..., labelled > 0].mean(-1) if labelled.any() else scores.mean(-1)


def _scores(confusion: np.ndarray) -> dict[str, float]:
    """The scores that follow from pixel counts, (predicted, labelled)."""
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
    """The log of a run's scores: metrics.csv, TensorBoard's events and a run in MLflow.

    As a context manager it tells MLflow how the run ended.

    Args:
        folder: of the run.
        record: what describes the run: `constants`, `id`, `demo`, `git`, and `data`, a fingerprint for each split.
        rows: scores of the epochs done so far; what was logged of later ones is dropped.

    Raises:
        OSError: something can't be written.
    """

    def __init__(self, folder: Path, record: dict, rows: Sequence[dict[str, float]] = ()):
        self.folder, self.record, self.rows = folder, record, list(rows)
        self._writers: dict[str, SummaryWriter] = {}
        self._scores: dict[str, float] = {}
        self._mlflow = MLflowRun(folder.name, record)

    def __enter__(self) -> ScoreLog:
        is_new = not any(self.folder.glob("events*"))
        self._write_csv()
        # TensorBoard reads files in the order of the times in their names, which another clock may have set ahead.
        ahead = [file for file in sorted(self.folder.rglob("events.out.tfevents.*"))
                 if int(file.name.split(".")[3]) >= int(time.time())]  # fmt: skip
        for number, file in enumerate(ahead, int(time.time()) - len(ahead)):
            file.rename(file.with_name(re.sub(r"\d{10}", f"{number:010}", file.name, count=1)))
        writer = self._writer("", int(self.rows[-1]["step"]) + 1 if self.rows else 1)
        if is_new:
            writer.add_text("constants", f"```\n{json.dumps(self.record, indent=2)}\n```")
            writer.flush()
        self._mlflow.send(self.rows)
        return self

    def step(self, step: int, **values: float) -> None:
        """Log values of a training step, for TensorBoard."""
        for name, value in values.items():
            self._writer("").add_scalar(f"steps/{name}", value, step)

    def epoch(self, row: dict[str, float], picture: Path | None = None) -> None:
        """Log the scores of the next epoch, and a picture; `send` passes them to MLflow.

        For TensorBoard train and val are two runs, so that it draws both into one chart; all but loss and IoU are under
        `more/`. Names that begin with neither `train_` nor `val_` are in metrics.csv and MLflow only.
        """
        self.rows.append({name: float(value) for name, value in row.items()})  # plain numbers, for the checkpoint
        self._write_csv()
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

    def send(self) -> None:
        """Pass the newest epoch to MLflow, now that it is saved; doesn't wait."""
        self._mlflow.send(self.rows[-1:], first=len(self.rows))

    def final_scores(self, split: str, scores: dict[str, float]) -> None:
        """Log scores that the run ends with, of a split or of "val_best", the best epoch's validation."""
        scores = {f"{split}/{name}": value for name, value in scores.items()}
        self._scores |= scores
        lines = [f"| {name} | {value:.4f} |" for name, value in scores.items()]
        self._writer("").add_text(f"scores, {split}", "\n".join(["| score | |", "|---|---|", *lines]))

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        status = "FINISHED" if error is None else "FAILED" if issubclass(error, Exception) else "KILLED"
        # best.pt stays where it is: a copy of 100 MB would lie in mlruns/.
        patterns = () if status == "KILLED" else ("*.json", "*.csv", "*.png", "predictions")
        files = [file for pattern in patterns for file in self.folder.glob(pattern)]
        self._mlflow.end(self.rows, self._scores, files, status)
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():  # the first error is the one to tell
            if error is None:
                self._write_hparams()
            for writer in self._writers.values():
                writer.close()

    def _writer(self, part: str, purge_step: int | None = None) -> SummaryWriter:
        """TensorBoard's writer for a folder; drops what a killed run wrote from `purge_step` on."""
        if part not in self._writers:
            self._writers[part] = SummaryWriter(self.folder / part, purge_step=purge_step)
        return self._writers[part]

    def _write_hparams(self) -> None:
        """The constants beside the scores by which runs are compared, for TensorBoard's table of runs."""
        finals = {name: value for name, value in self._scores.items() if name.endswith(("/iou", "/dice"))}
        constants = {name: value if value is not None else "None" for name, value in self.record["constants"].items()}
        constants["RUN_NAME"] = self.folder.name[-15:]  # the page cuts what is longer at its end
        writer = self._writer("")
        for summary in hparams(constants, finals):
            writer.file_writer.add_summary(summary)
        for name, value in finals.items():
            writer.add_scalar(name, value)

    def _write_csv(self) -> None:
        if not self.rows:
            return (self.folder / "metrics.csv").unlink(missing_ok=True)
        rows = [
            {"epoch": epoch, **{name: f"{value:.{12 if name == 'time' else 6}g}" for name, value in row.items()}}
            for epoch, row in enumerate(self.rows, 1)
        ]
        with atomic_write(self.folder / "metrics.csv") as file:
            table = csv.DictWriter(file, dict.fromkeys(itertools.chain(*rows)))
            table.writeheader()
            table.writerows(rows)


class MLflowRun:
    """A run's twin in MLflow, written by a separate thread: no server holds up training, no Ctrl-C breaks a write.

    Whatever is wrong with MLflow, the run goes on; one line says that it lacks something, and RESUME sends all again,
    which changes nothing of what is there.

    Args:
        name: what MLflow calls the run.
        record: as in `ScoreLog`; the tag `id` finds the run again.
    """

    def __init__(self, name: str, record: dict):
        import mlflow  # takes seconds; in the thread it could meet matplotlib's look for IPython half imported

        self.name, self.record, self.mlflow = name, record, mlflow
        self._run: object = None
        self._failed = False
        self._thread = ThreadPoolExecutor(max_workers=1)
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # what fails is told in one line
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds; MLflow's own is 120, tried eight times
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def send(self, rows: Sequence[dict[str, float]], first: int = 1) -> None:
        """Send epochs, the first of that number; after a failure nothing, until the end."""
        if not self._failed:
            self._thread.submit(self._send, list(rows), first)

    def end(self, rows: Sequence[dict], scores: dict[str, float], files: Sequence[Path], status: str) -> None:
        """Send all epochs again, the final scores, the files and how the run ended; wait until that is done."""
        self._thread.submit(self._send, list(rows), 1, scores, files, status)
        self._thread.shutdown()

    def _send(
        self, rows: Sequence[dict], first: int, scores: dict | None = None, files: Sequence[Path] = (), status: str = ""
    ) -> None:
        try:
            mlflow = self.mlflow
            self._run = self._run or self._start()
            for epoch, row in enumerate(rows, first):
                # With the same time again, a second sending adds nothing.
                values = {_sectioned(name): value for name, value in row.items()}
                mlflow.log_metrics(values, epoch, timestamp=int(1000 * row["time"]))
            if scores:
                mlflow.log_metrics(scores, len(rows), timestamp=int(1000 * rows[-1]["time"]) if rows else 0)
            for file in files:
                mlflow.log_artifact(str(file))
            if status:
                mlflow.end_run(status)
        except Exception as error:
            if not self._failed or status:
                again = "EVALUATE again" if self.record["constants"].get("EVALUATE") else f"RESUME=runs/{self.name}"
                reason = str(getattr(error.__cause__, "orig", error)).partition("\n")[0][:200]
                tqdm.write(f"MLflow lacks a part of this run ({reason}); {again} sends it")
            self._failed = True

    def _start(self) -> object:
        """Find the run, or make it."""
        create_database()
        mlflow = self.mlflow
        experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if experiment_id is None and "MLFLOW_RUN_ID" not in os.environ:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
            experiment = mlflow.get_experiment_by_name(name)
            if experiment and experiment.lifecycle_stage == "deleted":
                mlflow.MlflowClient().restore_experiment(experiment.experiment_id)
            experiment_id = experiment.experiment_id if experiment else mlflow.create_experiment(name)
        own = f"tags.id = '{self.record['id']}'"
        found = mlflow.search_runs([experiment_id], own, output_format="list") if experiment_id else []
        name = os.environ.get("MLFLOW_RUN_NAME") or self.name
        run = mlflow.start_run(found[0].info.run_id if found else None, experiment_id, run_name=name)
        mlflow.set_tags({name: str(self.record[name]) for name in ("id", "demo", "git")})
        mlflow.set_tags({f"data.{split}": digest for split, digest in self.record["data"].items()})
        logged, constants = run.data.params, self.record["constants"].items()
        mlflow.log_params({name: value for name, value in constants if name not in logged})
        # MLflow lets no parameter change: raised EPOCHS become a tag.
        mlflow.set_tags({name: value for name, value in constants if logged.get(name, str(value)) != str(value)})
        return run


def create_database() -> None:
    """Make mlflow.db at once or not at all: MLflow leaves half of one if it is killed meanwhile."""
    import mlflow

    uri = mlflow.get_tracking_uri()
    file = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or file.exists():
        return
    part = file.with_name(f"{file.name}.{os.urandom(6).hex()}.part")
    mlflow.MlflowClient(f"sqlite:///{part}").search_experiments()
    try:
        os.link(part, file)
    except OSError:  # another run was first, or the disk has no hard links
        if not file.exists():
            os.replace(part, file)
    part.unlink(missing_ok=True)


def _sectioned(name: str) -> str:
    """`train_loss` → `train/loss`, as MLflow has a section for each split; other names as they are."""
    return name.replace("_", "/", 1) if name.startswith(("train_", "val_")) else name
