"""Train FusionUNet on LEVIR-CD: `python main.py`, or `python main.py CONSTANT=value …` to change a constant once."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import platform
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import mlflow
import numpy as np
import torch
import torchvision
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Sampler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data.make_demo import make_demo
from dataset import LEVIRCD, DataError, color_jitter
from losses import CombinedIoULoss
from metrics import ChangeMetrics, ThresholdMetrics, as_table
from model import FusionUNet, ModelError
from visualize import OptionError, parse, pick_device, plot_curves, plot_precision_recall, plot_predictions, typed

# DATA
DATA_DIR: str = "data"  # holds train, val and, if there is one, test; a demo stands in for a missing data/train
CACHE_DIR: str | None = "data/cache"  # decoded pairs, 7 bytes a pixel (4.7 GB for LEVIR-CD); None: decode each time
CROP_SIZE: int | None = 256  # pixels, a side, in training and in validation; None: whole images
BRIGHTNESS: float = 0.1  # colour jitter, drawn for each image: factor 1 ± this; 0: off
CONTRAST: float = 0.1  # likewise
SATURATION: float = 0.1  # likewise
HUE: float = 0.01  # likewise, as ± a share of the colour circle, up to 0.5; 0: off

# MODEL
WEIGHTS: str | None = "IMAGENET1K_V1"  # of torchvision's ResNet-50, fetched once (98 MB); None: untrained
FREEZE_BACKBONE: bool = True  # False trains the ResNet-50 too: 28 M parameters instead of 5 M

# OPTIMISATION
BATCH_SIZE: int = 16  # pairs a step; halve it when the GPU's memory runs out
EPOCHS: int = 100  # passes over the training split, 7,120 crops of 256 each for LEVIR-CD
LEARNING_RATE: float = 1e-3  # its peak, for AdamW
WEIGHT_DECAY: float = 1e-2  # AdamW's, decoupled; 0: off
WARMUP_EPOCHS: float = 1.0  # the learning rate rises this long, then falls as a cosine to 0; 0: off
CLIP_NORM: float = 1.0  # largest norm of a step's gradient; 0: off
ALPHA: float = 0.5  # weight of BCE in the loss, the rest is soft IoU; 0..1

# RUNTIME
DEVICE: str | None = None  # "cuda", "cuda:1", "cpu"; None: the GPU where there is one
AMP: bool = True  # bfloat16 autocast on CUDA, for GPUs that have it (Ampere and newer); False: float32
NUM_WORKERS: int | None = None  # processes that load data; None: by the cores on a GPU, 0 on the CPU
SEED: int = 0  # of the weights, the order, the crops and the colours
RUN_NAME: str | None = None  # folder under runs/; None: date and time
EVALUATE: str | None = None  # checkpoint to score instead of training, such as runs/RUN/best.pt; None: train
SPLIT: str = "test"  # what EVALUATE scores; a training run ends with the scores of test, where it is there

PROTOCOL_CROP = 256  # pixels, a side of the tiles that the field's published scores are counted on

# What changes where there is no data yet: minutes on two CPU cores, and nothing to download.
DEMO = dict(DATA_DIR="data/demo", CROP_SIZE=128, WEIGHTS=None, BATCH_SIZE=4, EPOCHS=2, WARMUP_EPOCHS=0.2)


def main(**overrides: object) -> dict[str, float]:
    """Train, keep the best epoch by validation IoU and score it on the test split; with EVALUATE only score.

    Args:
        **overrides: constants of this module to change for this run.

    Returns:
        The scores: `val_iou`, `val_dice`, … of the best epoch, and `test_iou`, … as `evaluate` gives them.

    Raises:
        OptionError: an unknown constant, or a value that it can't have.
        DataError, ModelError: input, weights or a checkpoint that can't be used.
    """
    config, demo = configure(overrides)
    device = pick_device(config.DEVICE)
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
    torch.manual_seed(config.SEED)
    if config.EVALUATE is not None:
        model = FusionUNet.load(config.EVALUATE, device)
        loader = make_loader(config, device, config.SPLIT, PROTOCOL_CROP)
        with RunLog(config, demo, device, [loader]) as log:
            return evaluate(model, loader, config, log)

    loaders = {"train": make_loader(config, device, "train", config.CROP_SIZE, augment=True)}
    loaders["val"] = make_loader(config, device, "val", config.CROP_SIZE)
    if Path(config.DATA_DIR, "test").is_dir():
        loaders["test"] = make_loader(config, device, "test", PROTOCOL_CROP)
    model = FusionUNet(config.WEIGHTS, config.FREEZE_BACKBONE).to(device, memory_format=torch.channels_last)
    with RunLog(config, demo, device, loaders.values()) as log:
        scores = prefixed("val", fit(model, loaders, config, log))
        best = FusionUNet.load(log.folder / "best.pt", device)
        log.pictures(best, loaders["val"].dataset)
        if "test" in loaders:
            scores |= evaluate(best, loaders["test"], config, log)
    print(f"the best epoch's validation IoU: {scores['val_iou']:.4f}; see {log.folder}: best.pt, metrics.csv and more")
    return scores


def configure(overrides: dict[str, object]) -> tuple[SimpleNamespace, bool]:
    """The constants with the overrides put in, and whether this is the demo, which is drawn if need be."""
    hints = typing.get_type_hints(sys.modules[__name__])
    constants = {name: globals()[name] for name in hints}
    if unknown := overrides.keys() - constants.keys():
        raise OptionError(f"{', '.join(unknown)}: no such constant; there are {', '.join(constants)}")
    given = constants | overrides
    needed = given["SPLIT"] if given["EVALUATE"] else "train"
    demo = "DATA_DIR" not in overrides and DATA_DIR == "data" and not Path(DATA_DIR, str(needed)).is_dir()
    constants = constants | DEMO | overrides if demo else given
    constants = {name: checked(name, value, hints[name]) for name, value in constants.items()}
    if constants["EVALUATE"] is None and constants["SPLIT"] != "test":
        raise OptionError(f"SPLIT={constants['SPLIT']}: only together with EVALUATE; a training run scores test")
    if demo:
        used = ", ".join(f"{name}={constants[name]}" for name in DEMO)
        print(f"NO DATA in data/{needed} (see data/README.md): USING THE DEMO with {used}", flush=True)
        if not Path(constants["DATA_DIR"]).is_dir():
            make_demo(constants["DATA_DIR"])
    return SimpleNamespace(**constants), demo


def checked(name: str, value: object, hint: type) -> object:
    """The value, if the constant can have it."""
    value = typed(name, value, hint)
    if isinstance(value, int | float):
        least = 1 if name in ("CROP_SIZE", "BATCH_SIZE", "EPOCHS") else 0
        most = {"ALPHA": 1, "BRIGHTNESS": 1, "CONTRAST": 1, "SATURATION": 1, "HUE": 0.5}.get(name, sys.maxsize)
        if not least <= value <= most:
            raise OptionError(f"{name}={value}: must be {least} to {most}")
    if (name in ("RUN_NAME", "SPLIT") and value is not None and Path(value).name != value) or value == "":
        raise OptionError(f"{name}={value}: must be a name, and for a folder not a path")
    if name == "RUN_NAME" and value is not None and Path("runs", value).exists():
        raise OptionError(f"RUN_NAME={value}: runs/{value} is there already; name another")
    return value


class RandomDraws(Sampler):
    """Each index once, in random order, with the seed of its crop; all of it follows from torch's seed."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(torch.randperm(self.length).tolist(), torch.randint(2**31, (self.length,)).tolist(), strict=True)


def make_loader(
    config: SimpleNamespace, device: torch.device, split: str, crop_size: int | None, augment: bool = False
) -> DataLoader:
    """Batches of a split, tiles or random crops; with a cache, whatever is wrong with its files shows here."""
    on_gpu = device.type == "cuda"
    workers = config.NUM_WORKERS if config.NUM_WORKERS is not None else min(8, os.cpu_count()) if on_gpu else 0
    dataset = LEVIRCD(config.DATA_DIR, split, crop_size, augment, config.CACHE_DIR)
    if augment:
        full = len(dataset) >= config.BATCH_SIZE  # else the one batch there is
        sampling = {"sampler": RandomDraws(len(dataset)), "batch_size": config.BATCH_SIZE, "drop_last": full}
    else:
        sampling = {"batch_sampler": dataset.batches(config.BATCH_SIZE)}
    # With a generator of its own a loader draws nothing from torch's, whatever its workers.
    return DataLoader(
        dataset, num_workers=workers, persistent_workers=workers > 0, worker_init_fn=leave_signals_to_main,
        pin_memory=on_gpu, generator=torch.Generator(), **sampling,
    )  # fmt: skip


def leave_signals_to_main(_: int) -> None:
    """A worker outlives Ctrl-C, which reaches it too, until the main process ends it; that is no failure of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def fit(model: FusionUNet, loaders: dict[str, DataLoader], config: SimpleNamespace, log: RunLog) -> dict[str, float]:
    """Train for EPOCHS, validate, log and save after each; returns the validation scores of the epoch in best.pt."""
    trainable = filter(lambda parameter: parameter.requires_grad, model.parameters())
    optimizer = torch.optim.AdamW(trainable, config.LEARNING_RATE, weight_decay=config.WEIGHT_DECAY)
    steps, warmup = config.EPOCHS * len(loaders["train"]), config.WARMUP_EPOCHS * len(loaders["train"])
    scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, steps))
    best: dict[str, float] = {"iou": -1.0}
    for epoch in range(1, config.EPOCHS + 1):
        # An epoch's order, crops and colours follow from the seed and its number alone.
        torch.manual_seed(int(np.random.SeedSequence([config.SEED, epoch]).generate_state(1)[0]))
        metrics, learning_rate = ThresholdMetrics(), scheduler.get_last_lr()[0]
        train = run_pass(model, loaders["train"], config, ChangeMetrics(), optimizer, scheduler, f"epoch {epoch}")
        val = run_pass(model, loaders["val"], config, metrics, name="validation")
        is_best = val["iou"] > best["iou"]
        model.threshold = metrics.best_threshold()
        checkpoint = model.checkpoint() | {"epoch": epoch, "scores": val}
        if is_best:
            best = val
            save(checkpoint, log.folder / "best.pt")
        checkpoint |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "best": best}
        save(checkpoint, log.folder / "last.pt")
        row = prefixed("train", train) | prefixed("val", val) | {"learning_rate": learning_rate}
        log.epoch(epoch, row, model, loaders["val"].dataset)
        print(
            f"epoch {epoch}/{config.EPOCHS}: train loss {train['loss']:.4f}, IoU {train['iou']:.4f}; val loss "
            f"{val['loss']:.4f}, IoU {val['iou']:.4f}, Dice {val['dice']:.4f}; {train['pairs_per_second']:.1f} pairs/s"
            f"{', the best so far' if is_best else ''}",
            flush=True,
        )
    return best


def run_pass(
    model: FusionUNet, loader: DataLoader, config: SimpleNamespace, metrics: ChangeMetrics,
    optimizer: torch.optim.Optimizer | None = None, scheduler: LRScheduler | None = None, name: str = "",
) -> dict[str, float]:  # fmt: skip
    """One pass over a loader: training where an optimizer is given, evaluation otherwise.

    Returns:
        `loss`, the mean over the pairs, what `metrics` computes, and `pairs_per_second`; one host sync.
    """
    training, device = optimizer is not None, next(model.parameters()).device
    model.train(training)
    criterion, pairs, start = CombinedIoULoss(config.ALPHA), 0, time.perf_counter()
    loss_sum = torch.zeros((), device=device)
    shown = torch.zeros((), pin_memory=device.type == "cuda")  # the last loss that came in, read without waiting
    bar = tqdm(total=len(loader.dataset), desc=name, unit="pair", leave=False, disable=None)
    with torch.set_grad_enabled(training), bar:
        for batch in loader:
            image_a, image_b, label = (tensor.to(device, non_blocking=True) for tensor in batch)
            if training:
                strengths = config.BRIGHTNESS, config.CONTRAST, config.SATURATION, config.HUE
                image_a, image_b = color_jitter(image_a, *strengths), color_jitter(image_b, *strengths)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.AMP and device.type == "cuda"):
                logits = model(image_a, image_b)
            loss = criterion(logits, label)
            if training:
                optimizer.zero_grad()
                loss.backward()
                if config.CLIP_NORM:
                    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.CLIP_NORM)
                optimizer.step()
                scheduler.step()
            metrics.update(logits.detach(), label)
            loss_sum += loss.detach() * len(label)
            shown.copy_(loss.detach(), non_blocking=True)
            pairs += len(label)
            bar.set_postfix(loss=f"{shown.item():.4f}", refresh=False)
            bar.update(len(label))
    scores = {"loss": loss_sum.item() / pairs, **metrics.compute()}  # waits for the device, before the clock is read
    return scores | {"pairs_per_second": pairs / (time.perf_counter() - start)}


def evaluate(model: FusionUNet, loader: DataLoader, config: SimpleNamespace, log: RunLog) -> dict[str, float]:
    """Score a split in crops of 256 pixels, as the field does, and in whole images, as users see them.

    Returns:
        The split's scores in crops at 0.5 (`test_iou`) and at the checkpoint's threshold (`test_tuned_iou`), of whole
        images (`test_whole_iou`, `test_whole_tuned_iou`), `test_average_precision` and `test_threshold`.
    """
    split, crops, whole, rows = loader.dataset.folder.name, ThresholdMetrics(), ThresholdMetrics(), []
    run_pass(model, loader, SimpleNamespace(**vars(config) | {"AMP": False}), crops, name=split)  # as `predict` does
    images = LEVIRCD(config.DATA_DIR, split, cache_dir=config.CACHE_DIR)
    for index in tqdm(range(len(images)), desc=f"{split}, whole images", unit="pair", leave=False, disable=None):
        image_a, image_b, label = images[index]
        logits, image = model.predict(image_a, image_b).logit()[None, None], ChangeMetrics()
        whole.update(logits, label[None])
        image.update(logits, label[None])
        rows.append({"index": index, "name": images.name(index), **image.compute()})
    scores, table = {"average_precision": crops.average_precision(), "threshold": model.threshold}, {}
    for protocol, prefix, metrics in ((f"crops of {PROTOCOL_CROP}", "", crops), ("whole images", "whole_", whole)):
        for threshold, tuned in ((0.5, ""), (model.threshold, "tuned_")):
            table[f"{protocol}, above {threshold:.3f}"] = row = metrics.compute(threshold)
            scores |= {f"{prefix}{tuned}{name}": value for name, value in row.items()}
    print(f"{split} split; {model.threshold:.3f} was the best threshold on validation\n{as_table(table)}", flush=True)
    log.evaluation(prefixed(split, scores), sorted(rows, key=lambda row: row["iou"]), crops.curve(), model, images)
    return prefixed(split, scores)


def warmup_cosine(step: int, warmup: float, steps: int) -> float:
    """Factor of the peak learning rate: a linear rise over `warmup` steps, then a half cosine to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, steps - warmup)))) / 2


def save(checkpoint: dict, path: Path) -> None:
    """Write a checkpoint whole or not at all: beside its place first, then renamed into it."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class RunLog:
    """A run's folder, TensorBoard log and MLflow run; as a context it tells MLflow how the run ended."""

    def __init__(self, config: SimpleNamespace, demo: bool, device: torch.device, loaders: Iterable[DataLoader]):
        self.folder = Path("runs", config.RUN_NAME or datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
        self.folder.mkdir(parents=True)
        self.device = device
        modules, code = (torch, torchvision, np, matplotlib, mlflow), Path(__file__).parent
        commit = f"git -C '{code}' describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown"
        self.record = {
            "constants": vars(config),
            "demo": demo,
            "data": {loader.dataset.folder.name: loader.dataset.fingerprint() for loader in loaders},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "git": subprocess.getoutput(commit),
            "versions": {"python": platform.python_version(), **{m.__name__: m.__version__ for m in modules}},
        }
        (self.folder / "constants.json").write_text(json.dumps(self.record, indent=2) + "\n")
        sizes = ", ".join(f"{len(loader.dataset)} {loader.dataset.folder.name}" for loader in loaders)
        print(f"{self.folder}: {sizes} items of {config.DATA_DIR} on {self.record['device']}", flush=True)

    def __enter__(self) -> RunLog:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")
        mlflow.set_experiment("LEVIRCD-FusionUNet")
        mlflow.start_run(run_name=self.folder.name)
        mlflow.set_tags({"demo": self.record["demo"], "git": self.record["git"]})
        mlflow.log_params(self.record["constants"])
        self.writer = SummaryWriter(self.folder)
        self.writer.add_text("constants", f"```\n{json.dumps(self.record, indent=2)}\n```")
        return self

    def epoch(self, epoch: int, row: dict[str, float], model: FusionUNet, dataset: LEVIRCD) -> None:
        """Log an epoch's numbers and draw the same few validation items."""
        if self.device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        with open(self.folder / "metrics.csv", "a", newline="") as file:
            table = csv.DictWriter(file, ["epoch", *row])
            if epoch == 1:
                table.writeheader()
            table.writerow({"epoch": epoch, **row})
        for name, value in row.items():
            self.writer.add_scalar(name.replace("train_", "train/").replace("val_", "val/"), value, epoch)
        mlflow.log_metrics(row, step=epoch)
        picture = self.folder / "predictions" / f"epoch_{epoch:03}.png"
        figure = plot_predictions(model, dataset, self.device, num_samples=4, path=picture)
        self.writer.add_figure("predictions", figure, epoch, close=False)
        self.writer.flush()

    def pictures(self, model: FusionUNet, dataset: LEVIRCD) -> None:
        """Draw the curves and the best model's validation predictions."""
        plot_curves(self.folder / "metrics.csv", self.folder / "curves.png")
        picture = self.folder / "validation_predictions.png"
        plot_predictions(model, dataset, self.device, path=picture)
        Path("images").mkdir(exist_ok=True)
        Path("images", picture.name).write_bytes(picture.read_bytes())

    def evaluation(self, scores: dict, rows: list[dict], curve: dict, model: FusionUNet, images: LEVIRCD) -> None:
        """Write the scores, those of each image from the worst to the best, and what the two ends look like."""
        split = images.folder.name
        (self.folder / f"{split}_metrics.json").write_text(json.dumps(scores, indent=2) + "\n")
        order = [row.pop("index") for row in rows]
        with open(self.folder / "per_image.csv", "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        for name, value in scores.items():
            self.writer.add_scalar(name.replace("_", "/", 1), value)
        mlflow.log_metrics(scores)
        picture, title = self.folder / "precision_recall.png", f"{split} split, crops of {PROTOCOL_CROP}"
        plot_precision_recall(curve, (0.5, model.threshold), title, picture)
        plot_predictions(model, images, self.device, path=self.folder / "worst.png", items=order[:10])
        plot_predictions(model, images, self.device, path=self.folder / "best.png", items=order[:-11:-1])

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.writer.close()
        for pattern in ("best.pt", "*.json", "*.csv", "*.png", "predictions"):
            for file in self.folder.glob(pattern):
                mlflow.log_artifact(str(file))
        mlflow.end_run("FINISHED" if error is None else "FAILED" if issubclass(error, Exception) else "KILLED")


def prefixed(split: str, scores: dict[str, float]) -> dict[str, float]:
    """The scores under the names `split_score`."""
    return {f"{split}_{name}": value for name, value in scores.items()}


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        main(**parse(sys.argv[1:], typing.get_type_hints(sys.modules[__name__])))
    except (OptionError, DataError, ModelError) as error:
        sys.exit(f"error: {str(error).splitlines()[-1]}")  # the last line is the message, from a worker too
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU's memory ran out: lower BATCH_SIZE or CROP_SIZE")
