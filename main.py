"""Train FusionUNet on LEVIR-CD: `python main.py`, or `python main.py CONSTANT=value …` to change some for one run."""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # before the other imports, which take seconds
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda received, _: sys.exit(128 + received))
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None if closed
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's hasn't
            stream.reconfigure(errors="replace")  # a console may lack ² or the letters of a name

import ast
import contextlib
import csv
import datetime
import difflib
import itertools
import json
import math
import re
import shlex
import subprocess
import time
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import dataset
import model as network
from dataset import IGNORED, LEVIRCD, DataError, announce, atomic_write, folder_names, progress, rank, world
from losses import CombinedIoULoss
from metrics import ChangeMetrics, ScoreLog, format_table, match_objects, object_scores, to_classes
from model import FusionUNet, ModelError, autocast, fast_dtype, pick_device, read_checkpoint, save_checkpoint
from visualize import plot_curves, plot_precision_recall, plot_predictions

# DATA
DATA_DIR: str = "data"  # holds train and, if you have them, val (else a tenth of train) and test
FOLDERS: str = "A B label"  # of a split: before, after, masks; commas instead of spaces where the names hold spaces
CACHE_DIR: str | None = "data/cache"  # decoded pairs, 7 bytes a pixel (4.7 GB for LEVIR-CD); None: decode each time
NUM_CLASSES: int = 1  # of change, 1 to 254; with 1, masks hold 0 and 255; with more, 0 to this number
IGNORE: int | None = None  # mask value of pixels that are neither trained on nor scored; None: there is none
CROP_SIZE: int | None = 128  # side in pixels, in training; None: whole images. Scores are of tiles of 256
BRIGHTNESS: float = 0.1  # colour jitter, drawn for each image: factor 1 ± this; 0: off
CONTRAST: float = 0.1  # likewise
SATURATION: float = 0.1  # likewise
HUE: float = 0.01  # likewise, as ± a share of a full turn of the colour circle
SWAP_DATES: float = 0.0  # probability that a crop's dates are exchanged; with 0, construction differs from demolition

# MODEL
BACKBONE: str = "resnet50"  # torchvision's name: "resnet18", "convnext_tiny", "swin_t" or others with four strides
WEIGHTS: str | None = "IMAGENET1K_V1"  # torchvision's, downloaded once (98 MB); a file of them; a run's best.pt; None
FUSION: str = "concatenation"  # of the dates; "difference": their order has no effect; "attention": across them
FREEZE_BACKBONE: bool = True  # False trains the backbone too: 26 M parameters instead of 2.2 M

# OPTIMISATION
BATCH_SIZE: int = 16  # pairs a step, of all GPUs together; halve it when they run out of memory
EPOCHS: int = 100  # passes over the training split, 28,480 crops of 128 each for LEVIR-CD
LEARNING_RATE: float = 3e-3  # peak, for Muon (new convolutions) and AdamW; a trained backbone has a tenth
WEIGHT_DECAY: float = 1e-2  # decoupled; 0: off
WARMUP_EPOCHS: float = 1.0  # the learning rate rises this long, then falls as a cosine to 0; 0: off
CLIP_NORM: float = 1.0  # largest norm of a step's gradient; 0: off
ALPHA: float = 0.5  # weight of cross-entropy in the loss, the rest is soft IoU; 0..1

# RUNTIME
DEVICE: str | None = None  # "cuda", "cuda:1", "cpu"; None: the GPU where there is one
AMP: bool = True  # autocast to bfloat16, on GPUs without it to float16, where that is faster; False: float32
COMPILE: bool = False  # torch.compile for the training step: starts a minute or two later; slower on a CPU
NUM_WORKERS: int | None = None  # processes that load data; None: up to 8, by the CPU's cores, for a GPU; else 0
SEED: int = 0  # of the weights, the order, the crops and the colours
DETERMINISTIC: bool = False  # True: the same bits again on CUDA too, slower; the CPU always gives them
RESUME: str | None = None  # folder of a run to continue, such as runs/RUN; None: a new run
RUN_NAME: str | None = None  # folder under runs/; None: date and time
EVALUATE: str | None = None  # run, or checkpoint of one, to score instead of training, such as runs/RUN; None: train
SPLIT: str = "test"  # what EVALUATE scores; training ends with the scores of test, if it is there
TTA: bool = False  # True: scores are averaged over flips and quarter turns, in eight times the time

# DEMO: replaces the constants above while DATA_DIR is "data" and holds no data, for a run of minutes on two CPU cores
DEMO = {"DATA_DIR": "data/demo", "WEIGHTS": None, "BATCH_SIZE": 4, "EPOCHS": 3, "WARMUP_EPOCHS": 0.2}

# The types of the constants, by their annotations; where an edit has dropped one, that of the value.
CONSTANTS = [name for name in globals() if name.isupper() and name not in ("IGNORED", "LEVIRCD", "DEMO")]
TYPES = {name: type(globals()[name]) for name in CONSTANTS} | typing.get_type_hints(sys.modules[__name__])
RESUME_MAY_CHANGE = ("EPOCHS", "DATA_DIR", "CACHE_DIR", "DEVICE", "COMPILE", "NUM_WORKERS")

PROTOCOL_CROP = 256  # side in pixels of the tiles on which published scores are computed
READ_EVERY = 20  # steps between two readings of the loss, for which the host waits for the GPU
REFRESH_UNTIL = 200  # steps; BatchNorm statistics are re-estimated before a validation that comes before this step
ENOUGH_PAIRS = 8  # per process; with fewer, BatchNorm is synchronised across GPUs
NOT_FINITE = "the loss isn't finite; start a new run with a lower LEARNING_RATE or with AMP=False"


def main(**overrides: object) -> dict[str, float]:
    """Train, keep the epoch with the best validation IoU and score it on the test split; with EVALUATE only score.

    Args:
        **overrides: constants of this module to change for this run.

    Returns:
        The scores: `val_iou`, `val_dice`, … of the best epoch, and `test_iou`, … as `score` gives them.

    Raises:
        DataError, ModelError: a constant, data, weights or a checkpoint that can't be used.
        FloatingPointError: the loss is no longer finite.
        OSError: something can't be written.
    """
    with process_group():
        config, record = configure(overrides)
        device = set_up_torch(config)
        if config.EVALUATE is not None:
            return evaluate_checkpoint(config, record, device)
        with first_on_each_machine():
            data = open_data(config, record["demo"])
            arguments = config.FREEZE_BACKBONE, config.NUM_CLASSES, config.BACKBONE, config.FUSION
            model = FusionUNet(config.WEIGHTS, *arguments).to(device, memory_format=torch.channels_last)
        loader, val_loader = (open_loader(data[split], config, device) for split in ("train", "val"))
        criterion = CombinedIoULoss(config.ALPHA)
        state, rows = make_state(model, config, len(loader))

        with open_run(config, describe(config, record, device, data), rows) as log:
            for epoch in range(len(rows) + 1, config.EPOCHS + 1):
                start = time.perf_counter()
                seed_epoch(config.SEED, epoch)
                row = train_one_epoch(state, loader, criterion, config, epoch, log)
                if epoch * len(loader) <= REFRESH_UNTIL:
                    refresh_batchnorm(model, loader, config)
                val, counts = evaluate(model, val_loader, criterion, config, "validation")
                model.threshold = counts.best_threshold()
                row |= prefixed("val", val)
                row |= {"step": epoch * len(loader), "seconds": time.perf_counter() - start, "time": time.time()}
                if log is not None:  # in the first process
                    save_epoch(state, row, data["val"], config, log)
            leave_group()  # from here on the first process works alone, on whole splits
            return finish_run(data, device, config, log) if log is not None else {}


def train_one_epoch(
    state: SimpleNamespace, loader: DataLoader, criterion: nn.Module, config: SimpleNamespace, epoch: int,
    log: ScoreLog | None,
) -> dict[str, float]:  # fmt: skip
    """One pass over the training split; returns `train_loss`, `train_iou`, … and the learning rate."""
    model, optimizers, schedulers, scaler = state.model, state.optimizers, state.schedulers, state.scaler
    device, start = model.mean.device, time.perf_counter()
    metrics, loss_sum, pairs = ChangeMetrics(config.NUM_CLASSES), torch.zeros((), device=device), 0
    logged_sum, logged_pairs = 0.0, 0
    model.train()
    with progress(desc=f"epoch {epoch}", total=len(loader.dataset), unit="pair") as bar:
        for step, batch in enumerate(loader, 1):
            image_a, image_b, label = to_device(batch, device)
            image_a, image_b = jitter(image_a, image_b, config)
            with autocast(device, config.AMP):
                logits = state.parallel(image_a, image_b)
            loss = criterion(logits, label)
            model.zero_grad()
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.CLIP_NORM or math.inf)
            learning_rate = schedulers[0].get_last_lr()[0]
            overflowed = scaler.is_enabled() and not norm.isfinite()
            if not overflowed:  # else both optimizers skip this step, as the norm is of all gradients
                for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                    scaler.step(optimizer)
                    scheduler.step()
                metrics.update(logits, label)
                loss_sum += loss.detach() * len(label)
                pairs += len(label)
            scaler.update()
            bar.update(world() * len(label))
            if step % READ_EVERY == 0 or step == len(loader):
                total = loss_sum.item()  # the host waits for the GPU here; elsewhere in a step only in float16
                if pairs > logged_pairs and log is not None:
                    mean = (total - logged_sum) / (pairs - logged_pairs)
                    log.step((epoch - 1) * len(loader) + step, loss=mean, learning_rate=learning_rate)
                logged_sum, logged_pairs = total, pairs
                bar.set_postfix(loss=f"{total / max(pairs, 1):.4f}", refresh=False)
                if not math.isfinite(total) or (overflowed and scaler.get_scale() < 1) or pairs == 0:
                    steps = f"epoch {epoch}, steps {1 + (step - 1) // READ_EVERY * READ_EVERY} to {step}"
                    raise FloatingPointError(f"{steps}: {NOT_FINITE}")
    scores = {"loss": total / pairs, **metrics.compute()}
    scores["pairs_per_second"] = world() * pairs / (time.perf_counter() - start)
    row = prefixed("train", scores) | {"learning_rate": learning_rate}
    if device.type == "cuda":
        row["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row


@torch.no_grad()
def evaluate(
    model: FusionUNet, loader: DataLoader, criterion: nn.Module, config: SimpleNamespace, name: str, tta: bool = False
) -> tuple[dict[str, float], ChangeMetrics]:
    """One pass over a split, by all processes together.

    Returns:
        `loss`, the mean over the items, the scores at 0.5 and `pairs_per_second`; and the counts for other thresholds.
    """
    device, start = model.mean.device, time.perf_counter()
    metrics, loss_sum, pairs = ChangeMetrics(config.NUM_CLASSES), torch.zeros((), device=device), 0
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)  # the first process's BatchNorm statistics, which are saved
    model.eval()
    forward = model.average_over_flips if tta else model
    with progress(desc=name, total=len(loader.dataset), unit="pair") as bar:
        for batch in loader:
            image_a, image_b, label = to_device(batch, device)
            with autocast(device, config.AMP):
                logits = forward(image_a, image_b)
            metrics.update(logits, label)
            loss_sum += criterion(logits, label) * len(label)
            pairs += len(label)
            bar.update(world() * len(label))
    sums = torch.tensor([loss_sum.item(), pairs], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss, pairs = sums.tolist()
    if not math.isfinite(loss):
        raise FloatingPointError(f"{name}: {NOT_FINITE}")
    scores = {"loss": loss / pairs, **metrics.compute(), "pairs_per_second": pairs / (time.perf_counter() - start)}
    return scores, metrics


@torch.no_grad()
def refresh_batchnorm(model: FusionUNet, loader: DataLoader, config: SimpleNamespace) -> None:
    """Re-estimate the BatchNorm statistics as the mean over up to 20 training batches.

    Early in training the weights change too fast for running averages to follow.
    """
    norms = [module for module in model.modules()
             if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module.weight.requires_grad]  # fmt: skip
    momenta, device = [norm.momentum for norm in norms], model.mean.device
    model.train()
    for step, batch in enumerate(itertools.islice(loader, 20), 1):
        for norm in norms:
            norm.momentum = 1 / step  # the mean of all; None means the same, but makes the host wait in each layer
        image_a, image_b, _ = to_device(batch, device)
        with autocast(device, config.AMP):
            model(*jitter(image_a, image_b, config))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def save_epoch(
    state: SimpleNamespace, row: dict[str, float], val_data: LEVIRCD, config: SimpleNamespace, log: ScoreLog
) -> None:
    """Draw some predictions of a new epoch, log its scores, save its checkpoints and print a line."""
    model, epoch, best_path, picture = state.model, len(log.rows) + 1, log.folder / "best.pt", None
    if epoch == 1 or epoch % math.ceil(config.EPOCHS / 10) == 0:
        picture = log.folder / "predictions" / f"epoch_{epoch:03}.png"
        title = f"{log.folder.name}, epoch {epoch}, validation"
        plot_predictions(model, val_data, model.mean.device, num_samples=2, path=picture, title=title)
    log.epoch(row, picture)
    is_best = best_epoch(log.rows) == epoch or not best_path.exists()
    if is_best:
        save_checkpoint(model.checkpoint() | {"epoch": epoch}, best_path)
    last = model.checkpoint() | {
        "model": model.trained_state(), "backbone": model.backbone_checksum(), "rows": log.rows,
        "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
        "scaler": state.scaler.state_dict(), "steps_taken": state.schedulers[0].last_epoch,
    }  # fmt: skip
    save_checkpoint(last, log.folder / "last.pt")
    log.send()
    announce(
        f"epoch {epoch}/{config.EPOCHS}: train loss {row['train_loss']:.4f}, IoU {row['train_iou']:.4f}; "
        f"val loss {row['val_loss']:.4f}, IoU {row['val_iou']:.4f}, Dice {row['val_dice']:.4f}; "
        f"{row['train_pairs_per_second']:.1f} pairs/s{', the best so far' if is_best else ''}"
    )


def best_epoch(rows: Sequence[dict[str, float]]) -> int:
    """The epoch, from 1, with the highest validation IoU, ties broken by lower loss."""
    keys = [(row["val_iou"], -row["val_loss"]) for row in rows]
    return 1 + keys.index(max(keys))


def finish_run(
    data: dict[str, LEVIRCD], device: torch.device, config: SimpleNamespace, log: ScoreLog
) -> dict[str, float]:
    """Draw and score the best epoch; returns its scores."""
    best = FusionUNet.load(log.folder / "best.pt", device)
    epoch = read_checkpoint(log.folder / "best.pt")["epoch"]
    scores = {name: value for name, value in log.rows[epoch - 1].items() if name.startswith("val_")}
    log.final_scores("val_best", {name.removeprefix("val_"): value for name, value in scores.items()})
    plot_curves(log.folder / "metrics.csv", epoch, log.folder / "curves.png")
    picture, title = log.folder / "validation_predictions.png", f"{log.folder.name}, epoch {epoch}"
    plot_predictions(best, data["val"], device, path=picture, title=f"{title}, validation")
    Path("images").mkdir(exist_ok=True)
    with atomic_write(Path("images", picture.name), "wb") as file:
        file.write(picture.read_bytes())
    if "test" in data:
        scores |= score(best, data["test"], title, config, log)
    found = [f"{split} IoU {scores[f'{split}_iou']:.4f}, F1 {scores[f'{split}_dice']:.4f}" for split in data
             if f"{split}_iou" in scores]  # fmt: skip
    announce(
        f"\n{title}, the best of {len(log.rows)}: {'; '.join(found)}\n"
        f"  files            {log.folder}: best.pt, metrics.csv, curves.png and more (see README.md)\n"
        f"  predict a pair   python visualize.py {shlex.quote(str(log.folder / 'best.pt'))} BEFORE AFTER\n"
        f"  compare runs     tensorboard --logdir {log.folder.parent}"
    )
    return scores


# Scores


def evaluate_checkpoint(config: SimpleNamespace, record: dict, device: torch.device) -> dict[str, float]:
    """Score the checkpoint EVALUATE on SPLIT, into a new run folder; only the first process does so."""
    if rank() > 0:
        return {}
    leave_group()
    model = FusionUNet.load(config.EVALUATE, device)
    config.NUM_CLASSES = model.out_channels
    data = open_split(config, config.SPLIT, PROTOCOL_CROP)
    with open_run(config, describe(config, record, device, {config.SPLIT: data}), []) as log:
        scores = score(model, data, config.EVALUATE, config, log)
        announce(f"written to {log.folder}")
        return scores


def score(model: FusionUNet, data: LEVIRCD, title: str, config: SimpleNamespace, log: ScoreLog) -> dict[str, float]:
    """Score a whole split in crops of 256 pixels, as published results do, and in whole images, as users see them.

    Returns:
        The scores in crops at 0.5 (`test_iou`) and at the checkpoint's threshold (`test_tuned_iou`), in whole images
        (`test_whole_iou`, `test_whole_tuned_iou`) and of the objects in whole images at 0.5 (`test_object_f1`, …).
    """
    split, device = data.split, model.mean.device
    title += f", {split}" + (", averaged over flips and turns" if config.TTA else "")
    loader, criterion = open_loader(data, config, device), CombinedIoULoss(config.ALPHA)
    _, crops = evaluate(model, loader, criterion, config, split, config.TTA)
    images = open_split(config, split)
    torch.backends.cudnn.benchmark = False  # whole images may have many sizes
    whole, rows = score_images(model, images, config)
    scores, table, points = {"average_precision": crops.average_precision(), "threshold": model.threshold}, {}, {}
    for protocol, prefix, metrics in ((f"crops of {PROTOCOL_CROP}", "", crops), ("whole images", "whole_", whole)):
        for threshold, tuned in ((0.5, ""), (model.threshold, "tuned_")):
            row = metrics.compute(threshold)
            table[f"{protocol} > {threshold:.4g}"] = row
            scores |= {f"{prefix}{tuned}{name}": value for name, value in row.items()}
            if metrics is crops:
                points[threshold] = row
    counts = [sum(row[f"{kind}_objects"] for row in rows) for kind in ("matched", "labelled", "predicted")]
    objects = object_scores(*counts)
    scores |= objects
    announce(
        f"{config.DATA_DIR}, {title}: {len(rows)} images; {model.threshold:.4g} was the best threshold on validation\n"
        f"{format_table(table)}\n"
        f"objects at an IoU of 0.5: {', '.join(f'{name} {value:.4g}' for name, value in objects.items())}"
    )
    log.final_scores(split, scores)
    scores = prefixed(split, scores)
    with atomic_write(log.folder / f"{split}_metrics.json") as file:
        file.write(json.dumps(scores, indent=2) + "\n")
    rows.sort(key=lambda row: row["wrong_pixels"], reverse=True)
    with atomic_write(log.folder / "per_image.csv") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "index"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    caption = f"{title}\ncrops of {PROTOCOL_CROP}, AP {crops.average_precision():.3f}"
    plot_precision_recall(crops.curve(), points, caption, log.folder / "precision_recall.png")
    worst, caption = [row["index"] for row in rows[:10]], f"{title}: the images with the most wrong pixels"
    plot_predictions(model, images, device, path=log.folder / "worst.png", items=worst, title=caption)
    return scores


def score_images(model: FusionUNet, images: LEVIRCD, config: SimpleNamespace) -> tuple[ChangeMetrics, list[dict]]:
    """The counts over all whole images, and the scores of each image that has a valid pixel."""
    whole, rows = ChangeMetrics(config.NUM_CLASSES), []
    for index in progress(range(len(images)), desc=f"{images.split}, whole images", unit="pair"):
        image_a, image_b, label = images[index]
        if (label == IGNORED).all():
            continue
        logits = model.predict_logits(image_a, image_b, tta=config.TTA, amp=config.AMP)
        image = ChangeMetrics(config.NUM_CLASSES)
        for metrics in (whole, image):
            metrics.update(logits[None], label[None])
        counts = image.confusion()
        classes = to_classes(network.probabilities(logits).numpy())
        matched, labelled, predicted = match_objects(classes, label[0].numpy())
        rows.append({
            "index": index, "name": images.name(index), **image.compute(), "labelled_objects": labelled,
            "predicted_objects": predicted, "matched_objects": matched,
            "labelled_pixels": int(counts[:, 1:].sum()), "predicted_pixels": int(counts[1:].sum()),
            "wrong_pixels": int(counts.sum() - counts.trace()),
        })  # fmt: skip
    return whole, rows


def prefixed(split: str, scores: dict[str, float]) -> dict[str, float]:
    """The scores under the names `split_score`."""
    return {f"{split}_{name}": value for name, value in scores.items()}


# Data


def open_data(config: SimpleNamespace, is_demo: bool) -> dict[str, LEVIRCD]:
    """The splits train and val, and test where it has masks; draws the demo if that is to be used."""
    if is_demo and not Path(config.DATA_DIR).is_dir():
        try:
            from data.make_demo import make_demo
        except ImportError as error:  # a disk is mounted over data/
            raise OptionError("data holds neither train nor make_demo.py: give DATA_DIR") from error
        make_demo(config.DATA_DIR, num_classes=config.NUM_CLASSES)
    data = {
        "train": open_split(config, "train", config.CROP_SIZE, augment=True),
        "val": open_split(config, "val", PROTOCOL_CROP),
    }
    crop = (config.CROP_SIZE,) * 2 if config.CROP_SIZE else data["train"].sizes[0]
    pairs = min(config.BATCH_SIZE, len(data["train"])) // world()
    if pairs * math.prod(-(-side // 32) for side in crop) < 2:
        sizes = f"BATCH_SIZE={config.BATCH_SIZE}, CROP_SIZE={config.CROP_SIZE}"
        raise OptionError(f"{sizes}: too small: BatchNorm needs more than a value per channel at stride 32; raise one")
    test = Path(config.DATA_DIR, "test")
    if any(dataset.images_in(test / folder_names(config.FOLDERS)[2])):
        data["test"] = open_split(config, "test", PROTOCOL_CROP)
    elif test.is_dir():
        announce(f"{test}: no masks in it, so there is nothing to score")
    sizes = [f"{split} {len(each.files)} pairs, {len(each)} {'crops' if each.augment else 'tiles'}"
             for split, each in data.items()]  # fmt: skip
    announce(f"{config.DATA_DIR}: {'; '.join(sizes)}")
    return data


def open_split(config: SimpleNamespace, split: str, crop_size: int | None = None, augment: bool = False) -> LEVIRCD:
    """A split of DATA_DIR."""
    how_to_read = config.CACHE_DIR, config.NUM_CLASSES, config.IGNORE, folder_names(config.FOLDERS), config.SWAP_DATES
    data = LEVIRCD(config.DATA_DIR, split, crop_size, augment, *how_to_read)
    if not data.has_change:
        dataset.print_once(f"{config.DATA_DIR}: no mask of {split} holds any change")
    return data


def open_loader(data: LEVIRCD, config: SimpleNamespace, device: torch.device) -> DataLoader:
    """This process's loader of a split: its part of every training batch, or every n-th evaluation batch."""
    if data.augment:
        batches = dataset.RandomBatches(len(data), config.BATCH_SIZE)
    else:  # of about as many pixels as this process trains on in a step, for which there is memory
        pixels = config.BATCH_SIZE // world() * (config.CROP_SIZE or PROTOCOL_CROP) ** 2
        batches = data.batches(pixels)[rank() :: world()]
    return dataset.make_loader(data, batches, config.NUM_WORKERS, device.type == "cuda")


def to_device(batch: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on the device, copied while it computes."""
    return [tensor.to(device, non_blocking=device.type == "cuda") for tensor in batch]


def jitter(image_a: Tensor, image_b: Tensor, config: SimpleNamespace) -> Sequence[Tensor]:
    """Both dates with colour jitter, as float32 in 0..1."""
    images = torch.cat([image_a, image_b])
    return dataset.color_jitter(images, config.BRIGHTNESS, config.CONTRAST, config.SATURATION, config.HUE).chunk(2)


# Constants


class OptionError(DataError):
    """A constant, or a value for one, that isn't possible; the message says what is."""


def configure(overrides: dict[str, object]) -> tuple[SimpleNamespace, dict]:
    """The constants of this run, and the record of the run to resume, which for a new run holds `demo` alone.

    Given values come first, then those of the run to resume or evaluate, or the demo's, then those in this file.
    """
    used = set(re.findall(r'config(?:\.|\[")([A-Z][A-Z0-9_]*)', Path(__file__).read_text(encoding="utf-8")))
    for name in used - TYPES.keys():
        raise OptionError(f"{name}: not among the constants in main.py any more; was it renamed?")
    for name in TYPES.keys() - used:
        announce(f"{name}: nothing in main.py reads config.{name}")
    given = {name: parse(name, value) for name, value in overrides.items()}
    config = {name: parse(name, globals()[name]) for name in TYPES} | given
    record, resumed, evaluated = {"demo": False}, config["RESUME"], config["EVALUATE"]
    if resumed is not None:
        record = read_record(Path(resumed))
        if differing := sorted(record["constants"].keys() ^ TYPES.keys()):
            names = ", ".join(differing)
            raise OptionError(f"{resumed}: made by another version of this program; new or gone: {names}")
        config |= record["constants"] | given | {"RESUME": resumed}
        for name, began in record["constants"].items():
            if name not in (*RESUME_MAY_CHANGE, "RESUME") and config[name] != began:
                allowed = ", ".join(RESUME_MAY_CHANGE)
                raise OptionError(f"{name}={config[name]}: the run began with {began}; only {allowed} may change")
        if config["EPOCHS"] < record["constants"]["EPOCHS"]:
            raise OptionError(f"EPOCHS={config['EPOCHS']}: may be raised, but not lowered, when a run is resumed")
    elif evaluated is not None:
        folder = Path(evaluated) if Path(evaluated).is_dir() else Path(evaluated).parent
        if (folder / "constants.json").exists():
            own = {name: config[name] for name in ("EVALUATE", "SPLIT", "RUN_NAME", "DEVICE", "NUM_WORKERS", "TTA")}
            trained = read_record(folder)
            config |= {name: value for name, value in trained["constants"].items() if name in TYPES} | own | given
            record["demo"] = trained["demo"] and "DATA_DIR" not in given
    elif config["DATA_DIR"] == "data" and "DATA_DIR" not in given and not has_data(config["FOLDERS"]):
        record["demo"] = True
        folder = DEMO["DATA_DIR"] + ("_classes" if config["NUM_CLASSES"] > 1 else "")
        config |= DEMO | {"DATA_DIR": folder} | given
        values = ", ".join(f"{name}={config[name]}" for name in DEMO)
        announce(f"NO DATA in data (see data/README.md): USING THE DEMO with {values}")
    check(config, record["demo"])
    return SimpleNamespace(**config), record


def parse(name: str, value: object) -> object:
    """A constant's value, of the type that its annotation says; text from the command line is read as Python."""
    if name not in TYPES:
        near = difflib.get_close_matches(name.upper(), TYPES, 1)
        hint = f"did you mean {near[0]}?" if near else "python main.py --help lists them"
        raise OptionError(f"{name}: no such constant; {hint}")
    types = typing.get_args(TYPES[name]) or (TYPES[name],)
    if isinstance(value, str | os.PathLike):
        value = os.path.expanduser(value)
    if isinstance(value, str) and (str not in types or value == "None"):
        with contextlib.suppress(ValueError, SyntaxError):  # then it stays text, and is refused below
            value = ast.literal_eval(value)
    if type(value) is int and float in types:
        value = float(value)
    is_number = type(value) in (int, float)
    if type(value) not in types or value == "" or (is_number and not 0 <= value < math.inf):
        words = {str: "text", bool: "True or False", int: "a whole number, 0 or more", float: "a number, 0 or more"}
        raise OptionError(f"{name}={value}: must be {' or '.join(words.get(each, 'None') for each in types)}")
    return value


def check(config: dict[str, object], is_demo: bool) -> None:
    """Check what the types can't; OptionError where a value isn't possible."""

    def require(name: str, condition: bool, rule: str) -> None:
        if not condition:
            raise OptionError(f"{name}={config[name]}: must be {rule}")

    for name in ("BATCH_SIZE", "EPOCHS", "CROP_SIZE", "NUM_CLASSES"):
        require(name, config[name] != 0, "1 or more")
    for name in ("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE", "SWAP_DATES", "ALPHA"):
        require(name, config[name] <= 1, "from 0 to 1")
    for name in ("RUN_NAME", "SPLIT"):
        require(name, config[name] is None or Path(config[name]).name == config[name], "a name, not a path")
    for name, limit in (("NUM_CLASSES", 254), ("IGNORE", 255)):
        require(name, (config[name] or 0) <= limit, f"at most {limit}")
    require("NUM_CLASSES", not is_demo or config["NUM_CLASSES"] in (1, 3), "1 or 3 for the demo")
    require("BATCH_SIZE", config["BATCH_SIZE"] % world() == 0, f"a multiple of the {world()} processes")
    require("FOLDERS", len(folder_names(config["FOLDERS"])) == 3, "three names, as in 'A B label' or 'A,B,label'")
    require("SPLIT", config["EVALUATE"] or config["SPLIT"] == "test", "test, except with EVALUATE")
    is_new = config["RUN_NAME"] and not config["RESUME"] and rank() == 0
    require("RUN_NAME", not (is_new and Path("runs", config["RUN_NAME"]).exists()), "a new name; runs/ has this one")


def has_data(folders: str) -> bool:
    """Whether data/ holds a data set; OptionError where it holds images in another layout."""
    if Path("data", "train").is_dir():
        return True
    for folder in {Path("data").resolve(), Path(__file__).resolve().parent / "data"}:
        for name in dataset.images_in(folder):
            if not name.startswith(("demo", "cache")):
                expected = f"data/train/{{{','.join(folder_names(folders))}}}"
                raise OptionError(f"{folder / name}: not in {expected}; move it, or give DATA_DIR (see data/README.md)")
    return False


def from_command_line(arguments: Sequence[str]) -> dict[str, str]:
    """`NAME=value` arguments by name; where help is asked for, print the constants and end the program."""
    if {"-h", "--help", "help"} & set(arguments):
        source = Path(__file__).read_text(encoding="utf-8")
        constants = source[source.index("# DATA\n") : source.index("# The types of the constants")].rstrip()
        print(f"{__doc__}\n\nThe constants in main.py:\n\n{constants}")
        sys.exit()
    for argument in arguments:
        if "=" not in argument:
            raise OptionError(f"{argument}: give NAME=value; python main.py --help lists the names")
    return dict(argument.split("=", 1) for argument in arguments)


# The run's folder and what it resumes from


@contextlib.contextmanager
def open_run(config: SimpleNamespace, record: dict, rows: list[dict]) -> Iterator[ScoreLog | None]:
    """The log in the folder of the run, new or resumed; None in all processes but the first."""
    if rank() > 0:
        yield None
        return
    folder = Path(config.RESUME or Path("runs", config.RUN_NAME or time.strftime("%Y-%m-%d_%H-%M-%S")))
    while not config.RESUME and folder.exists():  # another run started in the same second
        folder = folder.with_name(folder.name + "_2")
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob(".*.part"):  # left by a process that was killed
        part.unlink()
    with atomic_write(folder / "constants.json") as file:
        file.write(json.dumps(record, indent=2) + "\n")
    announce(f"{folder.resolve()}: on {world()} × {record['device']}")
    try:
        with ScoreLog(folder, record, rows) as log:
            yield log
    except (FloatingPointError, torch.OutOfMemoryError):  # resuming would only repeat them
        raise
    except BaseException:
        if config.EVALUATE is None:
            announce(f"to continue this run: python main.py RESUME={shlex.quote(str(folder))}")
        raise


def describe(config: SimpleNamespace, record: dict, device: torch.device, data: dict[str, LEVIRCD]) -> dict:
    """The record of a run; DataError where the data of the run to resume have changed."""
    fingerprints = {name: split.fingerprint() for name, split in data.items()}
    if record.get("data", fingerprints) != fingerprints:
        raise DataError(f"{config.DATA_DIR}: not the files that {config.RESUME} was trained on; bring those back")
    git, commit = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"], ""
    with contextlib.suppress(OSError):  # git isn't installed
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "constants": vars(config) | {"RESUME": None}, "demo": record["demo"], "git": commit or "unknown",
        "id": record.get("id", os.urandom(8).hex()), "data": fingerprints, "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }  # fmt: skip


def read_record(folder: Path) -> dict:
    """The record in the folder of a training run; OptionError if there is none."""
    try:
        record = json.loads((folder / "constants.json").read_text(encoding="utf-8"))
        scored = record["constants"]["EVALUATE"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise OptionError(f"{folder}: not the folder of a run ({error}); give one of runs/") from error
    if scored is not None:
        raise OptionError(f"{folder}: that run only scored {scored}; give EVALUATE={scored} again")
    return record


def make_state(model: FusionUNet, config: SimpleNamespace, steps_per_epoch: int) -> tuple[SimpleNamespace, list[dict]]:
    """Model, optimizers, schedulers and scaler, and the scores of past epochs; restored from last.pt on RESUME."""
    optimizers = network.make_optimizers(model, config.LEARNING_RATE, config.WEIGHT_DECAY)
    float16 = config.AMP and fast_dtype(model.mean.device) == torch.float16
    scaler = torch.amp.GradScaler(model.mean.device.type, enabled=float16)
    rows, steps_taken = [], 0
    if config.RESUME is not None and (path := Path(config.RESUME, "last.pt")).exists():
        last = read_checkpoint(path)
        states = last["model"], model.trained_state()
        theirs, ours = ({name: value.shape for name, value in state.items()} for state in states)
        if theirs != ours:
            raise ModelError(f"{path}: made by an older version of this program; resume with that one")
        if config.FREEZE_BACKBONE and not math.isclose(last["backbone"], model.backbone_checksum(), rel_tol=1e-6):
            raise ModelError(f"{path}: trained over another backbone than WEIGHTS={config.WEIGHTS} gives now")
        model.load_state_dict(model.state_dict() | last["model"])
        for optimizer, state in zip(optimizers, last["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if last["scaler"] and float16:
            scaler.load_state_dict(last["scaler"])
        rows, steps_taken = last["rows"], last["steps_taken"]
        if len(rows) >= config.EPOCHS:
            announce(f"all {config.EPOCHS} epochs are done; raise EPOCHS to train on")
    warmup, steps = config.WARMUP_EPOCHS * steps_per_epoch, config.EPOCHS * steps_per_epoch
    schedulers = [LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, steps), steps_taken - 1)
                  for optimizer in optimizers]  # fmt: skip
    parallel = distribute(model, config)
    state = SimpleNamespace(model=model, parallel=parallel, optimizers=optimizers, schedulers=schedulers, scaler=scaler)
    return state, rows


def warmup_cosine(step: int, warmup: float, steps: int) -> float:
    """Factor of the peak learning rate: a linear rise over `warmup` steps, then a half cosine to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, steps - warmup)))) / 2


# PyTorch, and several processes, one for each GPU, as torchrun starts them


def set_up_torch(config: SimpleNamespace) -> torch.device:
    """Apply the constants that concern PyTorch as a whole; returns the device."""
    if config.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(config.DETERMINISTIC)
    torch.backends.cudnn.benchmark = not config.DETERMINISTIC  # nearly all batches have one size
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
    torch.manual_seed(config.SEED)
    device = pick_device(config.DEVICE)
    if config.AMP and fast_dtype(device) == torch.float32:
        announce("AMP: float32, as neither bfloat16 nor float16 is faster on this device")
    return device


def seed_epoch(seed: int, epoch: int) -> None:
    """Make the order, crops and colours of an epoch follow from the seed and its number alone."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes of torchrun, if there are any."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    yield
    leave_group()  # not after an error: leaving may wait for others, which wait for this one


def leave_group() -> None:
    """Leave the process group, if there is one: afterwards every process has rank 0 of 1."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def first_on_each_machine() -> Iterator[None]:
    """Run the block on local rank 0 first, then on the others, so that downloads and decoding happen once."""
    if world() == 1:
        yield
        return
    # Decoding a large data set may take hours; nothing else may take more than minutes.
    patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_first:
        dist.barrier(patient)
    yield
    if is_first:
        dist.barrier(patient)


def distribute(model: FusionUNet, config: SimpleNamespace) -> nn.Module:
    """The model to call in training: with several processes its gradients are averaged over all of them."""
    parallel = model
    if dist.is_initialized():
        if model.mean.is_cuda and config.BATCH_SIZE // world() < ENOUGH_PAIRS:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place; there is none for the CPU
        parallel = nn.parallel.DistributedDataParallel(model)
        # `evaluate` sends the first process's statistics to the others; they are not used before.
        parallel.broadcast_buffers = False  # an attribute in all versions; the argument was renamed in torch 2.14
    return torch.compile(parallel) if config.COMPILE else parallel


if __name__ == "__main__":
    try:
        main(**from_command_line(sys.argv[1:]))
    except Exception as error:
        if (line := network.error_line(error, memory="BATCH_SIZE or CROP_SIZE")) is None:
            raise
        sys.exit(f"error: {line}")
