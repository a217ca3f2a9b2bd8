"""Train FusionUNet on LEVIR-CD: `python main.py`, or `python main.py CONSTANT=value …` to change a constant once."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # before the other imports, which take seconds
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # they end it as they end others, after what must be told and closed
        signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    sys.stdout.reconfigure(errors="replace")  # a console may lack ² or the letters of a name
    sys.stderr.reconfigure(errors="replace")

import ast
import contextlib
import csv
import datetime
import difflib
import fcntl
import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from scipy import ndimage
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataset import (
    IGNORED,
    LEVIRCD,
    SUFFIXES,
    DataError,
    Objects,
    RandomBatches,
    color_jitter,
    make_loader,
    progress,
    usable_cores,
    written_whole,
)
from losses import CombinedIoULoss
from metrics import ChangeMetrics, ScoreLog, as_classes, as_logits, as_table, object_scores
from model import FusionUNet, ModelError, explanation, fast_dtype, make_optimizers, pick_device, read_checkpoint, save
from visualize import plot_curves, plot_precision_recall, plot_predictions

# DATA
DATA_DIR: str = "data"  # holds train, val and, if there is one, test; a demo stands in for a missing data/train
FOLDERS: str = "A B label"  # of a split: images before, images after, masks; CDD "A B OUT", SYSU-CD "time1 time2 label"
CACHE_DIR: str | None = "data/cache"  # decoded pairs, 7 bytes a pixel (4.7 GB for LEVIR-CD); None: decode each time
NUM_CLASSES: int = 1  # of change; 1: masks hold 0 and 255; more: 0 to this number
IGNORE: int | None = None  # mask value of pixels that are neither trained on nor scored; None: there is none
CROP_SIZE: int | None = 128  # pixels, a side, in training; None: whole images. Scores are of tiles of 256
BRIGHTNESS: float = 0.1  # colour jitter, drawn for each image: factor 1 ± this; 0: off
CONTRAST: float = 0.1  # likewise
SATURATION: float = 0.1  # likewise
HUE: float = 0.01  # likewise, as ± a share of the colour circle, up to 0.5; 0: off
SWAP_DATES: float = 0.0  # chance that a crop's dates are exchanged; 0: built and pulled down are told apart

# MODEL
BACKBONE: str = "resnet50"  # torchvision's name: "resnet18", "convnext_tiny", "swin_t" or others with four strides
WEIGHTS: str | None = "IMAGENET1K_V1"  # torchvision's, fetched once (98 MB); a file of them; a run's best.pt; None
FUSION: str = "concatenation"  # of the dates; "difference": their order makes no difference; "attention": across them
FREEZE_BACKBONE: bool = True  # False trains the backbone too: 26 M parameters instead of 2.2 M

# OPTIMISATION
BATCH_SIZE: int = 16  # pairs a step, of all GPUs together; halve it when their memory runs out
EPOCHS: int = 100  # passes over the training split, 28,480 crops of 128 each for LEVIR-CD
LEARNING_RATE: float = 3e-3  # its peak, for Muon (new convolutions) and AdamW; a trained backbone has a tenth
WEIGHT_DECAY: float = 1e-2  # decoupled; 0: off
WARMUP_EPOCHS: float = 1.0  # the learning rate rises this long, then falls as a cosine to 0; 0: off
CLIP_NORM: float = 1.0  # largest norm of a step's gradient; 0: off
ALPHA: float = 0.5  # weight of cross-entropy in the loss, the rest is soft IoU; 0..1

# RUNTIME
DEVICE: str | None = None  # "cuda", "cuda:1", "cpu"; None: the GPU where there is one
AMP: bool = True  # autocast to bfloat16, to float16 on GPUs that lack it, neither where both are slow; False: float32
COMPILE: bool = False  # torch.compile for the training step: begins a minute or two later, and is slower on a CPU
NUM_WORKERS: int | None = None  # processes that load data; None: by the cores on a GPU, 0 on the CPU
SEED: int = 0  # of the weights, the order, the crops and the colours
DETERMINISTIC: bool = False  # True: the same bits again on CUDA too, slower; the CPU gives them in any case
RESUME: str | None = None  # folder of a run to go on with, such as runs/RUN; None: a new run
RUN_NAME: str | None = None  # folder under runs/; None: date and time
EVALUATE: str | None = None  # run, or checkpoint of one, to score instead of training, such as runs/RUN; None: train
SPLIT: str = "test"  # what EVALUATE scores; a training run ends with the scores of test, where it is there
TTA: bool = False  # True: what is scored is averaged over flips and quarter turns, in eight times the time

# What each constant may be: its type, the least and the most of a number, and None where that means something.
LARGEST = sys.maxsize
ALLOWED = {
    (str,): "DATA_DIR FOLDERS BACKBONE FUSION SPLIT",
    (str, None): "CACHE_DIR WEIGHTS DEVICE RESUME RUN_NAME EVALUATE",
    (bool,): "FREEZE_BACKBONE AMP COMPILE DETERMINISTIC TTA",
    (int, 0, LARGEST): "SEED",
    (int, 0, LARGEST, None): "NUM_WORKERS",
    (int, 1, LARGEST): "BATCH_SIZE EPOCHS",
    (int, 1, LARGEST, None): "CROP_SIZE",
    (int, 1, 254): "NUM_CLASSES",
    (int, 0, 255, None): "IGNORE",
    (float, 0, LARGEST): "LEARNING_RATE WEIGHT_DECAY WARMUP_EPOCHS CLIP_NORM",
    (float, 0, 1): "BRIGHTNESS CONTRAST SATURATION SWAP_DATES ALPHA",
    (float, 0, 0.5): "HUE",
}
ALLOWED = {name: allowed for allowed, names in ALLOWED.items() for name in names.split()}

# Where there is no data yet, constants that stand above as they came get values that take minutes on two CPU cores.
DEMO = {
    "DATA_DIR": ("data", "data/demo"), "WEIGHTS": ("IMAGENET1K_V1", None),
    "BATCH_SIZE": (16, 4), "EPOCHS": (100, 3), "WARMUP_EPOCHS": (1.0, 0.2),
}  # fmt: skip

# What may change when a run goes on; anything else would make it another experiment.
CHANGEABLE = ("EPOCHS", "DATA_DIR", "CACHE_DIR", "DEVICE", "COMPILE", "NUM_WORKERS")

# What isn't taken from the run whose checkpoint is scored; the rest is, unless it is given.
OF_EACH_RUN = ("DEVICE", "NUM_WORKERS", "RESUME", "RUN_NAME", "EVALUATE", "SPLIT")

PROTOCOL_CROP = 256  # pixels, a side of the tiles that the field's published scores are counted on
READ_EVERY = 20  # steps, in which the host runs ahead of a GPU before it waits to read the loss
SETTLED_AFTER = 200  # steps; until then BatchNorm's statistics are taken anew before each validation
ENOUGH_PAIRS = 8  # for BatchNorm in a process of several; with fewer it takes all processes', and waits for these
BATCH_NORMS = nn.BatchNorm2d | nn.SyncBatchNorm


def main(**overrides: object) -> dict[str, float]:
    """Train, keep the best epoch by validation IoU and score it on the test split; with EVALUATE only score.

    Args:
        **overrides: constants of this module to change for this run.

    Returns:
        The scores: `val_iou`, `val_dice`, … of the best epoch, and `test_iou`, … as `score` gives them.

    Raises:
        OptionError: an unknown constant, or a value that it can't have.
        DataError, ModelError: input, weights or a checkpoint that can't be used.
        FloatingPointError: the loss isn't finite any more.
        OSError: something can't be written.
    """
    with process_group(), contextlib.ExitStack() as one_at_a_time:
        one_at_a_time.enter_context(first_of_machine())
        config, began = configure(overrides)
        if config.DETERMINISTIC:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(config.DETERMINISTIC)
        torch.backends.cudnn.benchmark = not config.DETERMINISTIC  # nearly all batches have one size
        device = pick_device(config.DEVICE)
        torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
        torch.manual_seed(config.SEED)
        if config.EVALUATE is not None:
            one_at_a_time.close()
            return evaluate_checkpoint(config, began, device)
        last = last_checkpoint(config.RESUME)
        if last:
            model = FusionUNet.load(Path(config.RESUME, "last.pt"), device)
        else:
            model = FusionUNet(
                config.WEIGHTS, config.FREEZE_BACKBONE, config.NUM_CLASSES, config.BACKBONE, config.FUSION
            )
            model.to(device, memory_format=torch.channels_last)
        model.amp = config.AMP
        data = {"train": pairs_of(config, "train", config.CROP_SIZE, augment=True)}
        data["val"] = pairs_of(config, "val", PROTOCOL_CROP)
        if (test := Path(config.DATA_DIR, "test")).is_dir():
            if any(test.joinpath(config.FOLDERS.split()[2]).glob("*")):
                data["test"] = pairs_of(config, "test", PROTOCOL_CROP)
            else:
                say(f"{test}: no masks in it, so there is nothing to score")
        record = describe(config, began, device, data)
        one_at_a_time.close()
        if rank() > 0:
            return train(model, data, config, None, last)
        with run_folder(config, record) as folder, ScoreLog(folder, record, last["rows"] if last else ()) as log:
            try:
                return train_and_score(model, data, config, log, last)
            except BaseException as error:
                if not isinstance(error, FloatingPointError | torch.OutOfMemoryError):  # which would come again
                    say(f"the run can go on: python main.py RESUME={folder}")
                raise


def train_and_score(
    model: FusionUNet, data: dict[str, LEVIRCD], config: SimpleNamespace, log: ScoreLog, last: dict | None
) -> dict[str, float]:
    """Train up to EPOCHS, then draw and score the best epoch's model; returns the scores."""
    sizes = ", ".join(f"{len(items)} {split}" for split, items in data.items())
    several = f"{world()} × " if world() > 1 else ""
    say(f"{log.folder.resolve()}: {sizes} items of {config.DATA_DIR} on {several}{log.record['device']}")
    log.send()
    warn(data, config)
    if config.AMP and fast_dtype(model.mean.device) == torch.float32:
        say("AMP: this device is no faster in bfloat16 or float16, so it is float32")
    if last and len(last["rows"]) >= config.EPOCHS:
        say(f"all {config.EPOCHS} epochs are done; raise EPOCHS to train on")
    scores = train(model, data, config, log, last)
    leave_group()  # from here on the first process works alone, on whole splits
    best = FusionUNet.load(log.folder / "best.pt", model.mean.device)
    best_epoch = 1 + best_index(log.rows, data["val"].has_change)
    plot_curves(log.folder / "metrics.csv", best_epoch, log.folder / "curves.png")
    picture = log.folder / "validation_predictions.png"
    plot_predictions(best, data["val"], best.mean.device, path=picture)
    Path("images").mkdir(exist_ok=True)
    with written_whole(Path("images", picture.name), "wb") as file:
        file.write(picture.read_bytes())
    log.scores("val_best", {name.removeprefix("val_"): value for name, value in scores.items()})
    if "test" in data:
        scores |= score(best, data["test"], config, log)
    if not scores["val_iou"]:
        say("the best validation IoU is 0: more EPOCHS or pairs, or a smaller BATCH_SIZE, may help")
    of_splits = [f"{split} IoU {scores[f'{split}_iou']:.4f}, F1 {scores[f'{split}_dice']:.4f}"
                 for split in ("val", "test") if f"{split}_iou" in scores]  # fmt: skip
    say(
        f"\n{best.origin} of {len(log.rows)}, the best: {'; '.join(of_splits)}\n"
        f"  all of it       {log.folder}: best.pt, metrics.csv, curves.png and more (README.md, Start)\n"
        f"  your own masks  python visualize.py {log.folder}/best.pt BEFORE AFTER\n"
        f"  all runs        tensorboard --logdir {log.folder.parent}"
    )
    return scores


def train(
    model: FusionUNet, data: dict[str, LEVIRCD], config: SimpleNamespace, log: ScoreLog | None, last: dict | None
) -> dict[str, float]:
    """Train up to EPOCHS, from the checkpoint `last` on if there is one, and validate after each epoch.

    Returns:
        The validation scores of the epoch in best.pt, `val_iou` …; of several processes the one with the log saves.

    Raises:
        FloatingPointError: the loss isn't finite; what was saved last is kept.
    """
    device = model.mean.device
    loader, val_loader = (load(data[split], config, device) for split in ("train", "val"))
    jitter = functools.partial(
        color_jitter, brightness=config.BRIGHTNESS, contrast=config.CONTRAST, saturation=config.SATURATION,
        hue=config.HUE, rank=rank(), world=world(),
    )  # fmt: skip
    parallel = wrapped(model, config.BATCH_SIZE // world(), config.COMPILE)
    optimizers = make_optimizers(model, config.LEARNING_RATE, config.WEIGHT_DECAY)
    rows = last["rows"] if last else []
    for optimizer, state in zip(optimizers, last["optimizers"] if last else (), strict=False):
        optimizer.load_state_dict(state)
    scaler = torch.amp.GradScaler(device.type, enabled=config.AMP and fast_dtype(device) == torch.float16)
    if last and last.get("scaler"):
        scaler.load_state_dict(last["scaler"])
    steps, warmup = config.EPOCHS * len(loader), config.WARMUP_EPOCHS * len(loader)
    steps_taken = last.get("steps_taken", len(rows) * len(loader)) if last else 0  # but for those skipped in float16
    criterion, metrics = make_criterion(config), ChangeMetrics(config.NUM_CLASSES)
    anything_to_find = data["val"].has_change
    best = rows[best_index(rows, anything_to_find)] if rows else None
    began, drawing = time.perf_counter(), 0.0  # seconds

    for epoch in range(len(rows) + 1, config.EPOCHS + 1):
        # An epoch's order, crops and colours follow from the seed and its number alone.
        torch.manual_seed(int(np.random.SeedSequence([config.SEED, epoch]).generate_state(1)[0]))
        peak, start = 0.0, time.perf_counter()
        model.train()
        metrics.reset()
        loss_sum, pairs, read = torch.zeros((), device=device), 0, (0.0, 0)
        with progress(desc=f"epoch {epoch}", total=len(loader.dataset), unit="pair") as bar:
            for step, batch in enumerate(loader, 1):
                image_a, image_b, label = (tensor.to(device, non_blocking=device.type == "cuda") for tensor in batch)
                image_a, image_b = jitter(torch.cat([image_a, image_b])).chunk(2)  # both dates in one go
                with model.autocast():
                    logits = parallel(image_a, image_b)
                loss = criterion(logits, label)
                model.zero_grad()
                scaler.scale(loss).backward()
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(model.parameters(), config.CLIP_NORM or math.inf)
                overflowed = scaler.is_enabled() and not norm.isfinite()  # in float16 the host waits here
                factor = warmup_cosine(steps_taken, warmup, steps)
                learning_rate, peak = factor * config.LEARNING_RATE, max(peak, factor * config.LEARNING_RATE)
                if not overflowed:
                    for optimizer in optimizers:
                        for group in optimizer.param_groups:
                            group["lr"] = factor * group["initial_lr"]
                        scaler.step(optimizer)
                    steps_taken += 1
                    metrics.update(logits, label)
                    loss_sum += loss.detach() * len(label)
                    pairs += len(label)
                if scaler.is_enabled():
                    scaler.update()  # halves the scale after an overflow
                    if scaler.get_scale() < 1:
                        raise FloatingPointError(f"epoch {epoch}, step {step}: float16 overflows; set AMP=False")
                bar.update(world() * len(label))
                if step % READ_EVERY == 0 or step == len(loader):
                    # Here the host waits for the device, and, but in float16, nowhere else in a step.
                    so_far = loss_sum.item(), pairs
                    mean_loss = so_far[0] / max(1, pairs)
                    if log is not None and pairs > read[1]:
                        loss_since = (so_far[0] - read[0]) / (pairs - read[1])
                        log.step((epoch - 1) * len(loader) + step, loss=loss_since, learning_rate=learning_rate)
                    read = so_far
                    bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
                    if not math.isfinite(mean_loss):
                        where = f"epoch {epoch}, steps {1 + (step - 1) // READ_EVERY * READ_EVERY} to {step}"
                        hint = "lower LEARNING_RATE, or set AMP=False"
                        raise FloatingPointError(f"{where}: the loss is {mean_loss}; {hint}")
        if not pairs:
            raise FloatingPointError(f"epoch {epoch}: float16 overflowed in each of its steps; set AMP=False")
        row = {"loss": mean_loss, **metrics.compute()}
        row = prefixed("train", row | {"pairs_per_second": world() * pairs / (time.perf_counter() - start)})

        if epoch * len(loader) <= SETTLED_AFTER:
            settle(model, loader, jitter)
        val, counts = evaluate(model, val_loader, config, "validation")
        model.threshold = counts.best_threshold()
        row |= prefixed("val", val)
        row |= {  # one more number an epoch: here
            "learning_rate": learning_rate, "peak_learning_rate": peak, "step": epoch * len(loader),
            "seconds": time.perf_counter() - start,
        }  # fmt: skip
        if device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        is_best = best is None or best_index([best, row], anything_to_find) == 1
        best = row if is_best else best
        if log is None:
            continue
        picture, start = log.folder / "predictions" / f"epoch_{epoch:03}.png", time.perf_counter()
        # Of about ten epochs, and in a tenth of the time at most.
        if (epoch == 1 or epoch % math.ceil(config.EPOCHS / 9) == 0) and drawing <= (start - began) / 10:
            model.origin = f"{log.folder.name}, epoch {epoch}"
            plot_predictions(model, data["val"], device, num_samples=2, path=picture)
            drawing += time.perf_counter() - start
        log.epoch(row, picture if picture.exists() else None)
        if is_best:
            save(model.checkpoint() | {"epoch": epoch, "scores": val}, log.folder / "best.pt")
        states = {"optimizers": [optimizer.state_dict() for optimizer in optimizers], "rows": log.rows}
        states |= {"scaler": scaler.state_dict(), "steps_taken": steps_taken}
        save(model.checkpoint(whole=False) | {"epoch": epoch} | states, log.folder / "last.pt")
        log.send()
        if epoch >= 5 and epoch % 5 == 0 and anything_to_find and not any(each["val_iou"] for each in log.rows[-5:]):
            say("nothing that changed was found for five epochs: raise ALPHA or LEARNING_RATE, or look at the masks")
        say(
            f"epoch {epoch}/{config.EPOCHS}: train loss {row['train_loss']:.4f}, IoU {row['train_iou']:.4f}; val loss "
            f"{val['loss']:.4f}, IoU {val['iou']:.4f}, Dice {val['dice']:.4f}; {row['train_pairs_per_second']:.1f} "
            f"pairs/s{', the best so far' if is_best else ''}"
        )
    return {name: value for name, value in best.items() if name.startswith("val_")}


def make_criterion(config: SimpleNamespace) -> nn.Module:
    """The loss that is trained on and validated: of logits (N, K, H, W) and labels (N, 1, H, W), a scalar in float32.

    Another one has to know what `CombinedIoULoss.forward` says of its arguments, and to sum over all processes.
    """
    return CombinedIoULoss(config.ALPHA)


@torch.no_grad()
def evaluate(
    model: FusionUNet, loader: DataLoader, config: SimpleNamespace, name: str
) -> tuple[dict[str, float], ChangeMetrics]:
    """One pass over a split, of all processes together.

    Returns:
        `loss`, the mean over the pairs, the scores at 0.5 and `pairs_per_second`; and the counts for other thresholds.

    Raises:
        FloatingPointError: the loss isn't finite.
    """
    device, start = model.mean.device, time.perf_counter()
    criterion, metrics = make_criterion(config), ChangeMetrics(config.NUM_CLASSES)
    loss_sum, pairs = torch.zeros((), device=device), 0
    for buffer in model.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)  # BatchNorm's statistics, which differ on CPUs: those that are saved
    model.eval()
    with progress(desc=name, total=len(loader.dataset), unit="pair") as bar:
        for batch in loader:
            image_a, image_b, label = (tensor.to(device, non_blocking=device.type == "cuda") for tensor in batch)
            with model.autocast():
                if model.tta:
                    logits = as_logits(model.probability(image_a, image_b, tta=True))
                else:
                    logits = model(image_a, image_b)
            loss = criterion(logits, label)
            metrics.update(logits, label)
            loss_sum += loss * len(label)
            pairs += len(label)
            bar.update(world() * len(label))
    sums = torch.tensor([loss_sum.item(), pairs], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss, pairs = sums.tolist()
    if not math.isfinite(loss):
        raise FloatingPointError(f"{name}: the loss is {loss}; lower LEARNING_RATE, or set AMP=False")
    scores = {"loss": loss / pairs, **metrics.compute(), "pairs_per_second": pairs / (time.perf_counter() - start)}
    return scores, metrics


def evaluate_checkpoint(config: SimpleNamespace, began: dict, device: torch.device) -> dict[str, float]:
    """Score the checkpoint EVALUATE on SPLIT, into a run folder of its own; the first process does it alone."""
    if rank() > 0:
        return {}
    leave_group()
    model = FusionUNet.load(config.EVALUATE, device)
    model.amp = config.AMP
    if (classes := model.head.out_channels) != config.NUM_CLASSES:
        raise OptionError(f"NUM_CLASSES={config.NUM_CLASSES}: give {classes}, as {config.EVALUATE} has")
    data = pairs_of(config, config.SPLIT, PROTOCOL_CROP)
    record = describe(config, began, device, {config.SPLIT: data})
    with run_folder(config, record) as folder, ScoreLog(folder, record) as log:
        return score(model, data, config, log)


def score(model: FusionUNet, data: LEVIRCD, config: SimpleNamespace, log: ScoreLog) -> dict[str, float]:
    """Score a split in crops of 256 pixels, as the field does, and in whole images, as users see them.

    One process does it, once it has left the group: a loader that is made here is of the whole split.

    Returns:
        The split's scores in crops at 0.5 (`test_iou`) and at the checkpoint's threshold (`test_tuned_iou`), of whole
        images (`test_whole_iou`, `test_whole_tuned_iou`), `test_average_precision` and `test_threshold`; of the
        objects in whole images, at 0.5, `test_object_f1` and others.
    """
    split, rows, whole = data.folder.name, [], ChangeMetrics(config.NUM_CLASSES)
    model.tta, averaged = config.TTA, ", averaged over flips and turns" * config.TTA
    _, crops = evaluate(model, load(data, config, model.mean.device), config, split)
    torch.backends.cudnn.benchmark = False  # whole images may have many sizes
    images, are_small, found, missed = pairs_of(config, split), True, np.zeros(3, int), []
    for index in progress(range(len(images)), desc=f"{split}, whole images", unit="pair"):
        image_a, image_b, label = images[index]
        if (label == IGNORED).all():
            continue
        are_small &= max(label.shape) <= PROTOCOL_CROP
        logits, image = as_logits(model.predict(image_a, image_b)), ChangeMetrics(config.NUM_CLASSES)
        whole.update(logits, label[None])
        image.update(logits, label[None])
        counts, objects = image.confusion(), Objects(as_classes(logits)[0].numpy(), label[0].numpy())
        found += np.array([objects.found.sum(), len(objects.found), len(objects.right)])
        numbers = 1 + np.flatnonzero(~objects.found)
        lacking = ndimage.sum(1 - logits.logsumexp(1)[0].sigmoid().numpy(), objects.labelled, numbers)  # pixels
        middles = ndimage.center_of_mass(objects.labelled > 0, objects.labelled, numbers)
        missed += [(lacks, index, int(y), int(x)) for lacks, (y, x) in zip(lacking, middles, strict=True)]
        rows.append({"index": index, "name": images.name(index), **image.compute(),
                     "labelled_objects": len(objects.found), "predicted_objects": len(objects.right),
                     "matched_objects": int(objects.found.sum()),
                     "labelled_pixels": int(counts[:, 1:].sum()), "predicted_pixels": int(counts[1:].sum()),
                     "wrong_pixels": int(counts.sum() - counts.trace())})  # fmt: skip
    scores, table, points = {"average_precision": crops.average_precision(), "threshold": model.threshold}, {}, {}
    for protocol, prefix, metrics in ((f"crops of {PROTOCOL_CROP}", "", crops), ("whole", "whole_", whole)):
        for threshold, tuned in ((0.5, ""), (model.threshold, "tuned_")):
            row = metrics.compute(threshold)
            scores |= {f"{prefix}{tuned}{name}": value for name, value in row.items()}
            if prefix == "" or not are_small:
                table[f"{protocol} > {threshold:.4g}"] = row
            if prefix == "":
                points[threshold] = row
    of_objects = object_scores(*found.tolist())
    scores |= of_objects
    same = f"\nno image is larger than {PROTOCOL_CROP} pixels: crops and whole images are the same" * are_small
    say(
        f"{config.DATA_DIR}, {split}, {len(rows)} images{averaged}; "
        f"{model.threshold:.4g} was the best threshold on validation\n"
        f"{as_table(table)}{same}\n"
        f"{found[1]:,} objects are labelled, {found[2]:,} predicted, {found[0]:,} match by an IoU of 0.5: "
        f"precision {of_objects['object_precision']:.4f}, recall {of_objects['object_recall']:.4f}, "
        f"F1 {of_objects['object_f1']:.4f}"
    )
    log.scores(split, scores)
    scores = prefixed(split, scores)
    with written_whole(log.folder / f"{split}_metrics.json") as file:
        file.write(json.dumps(scores, indent=2) + "\n")
    rows.sort(key=lambda row: row["wrong_pixels"], reverse=True)
    with written_whole(log.folder / "per_image.csv") as file:
        table = csv.DictWriter(file, [name for name in rows[0] if name != "index"], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    title = f"{model.origin}: {split}, crops of {PROTOCOL_CROP}{averaged}, AP {crops.average_precision():.3f}"
    plot_precision_recall(crops.curve(), points, title, log.folder / "precision_recall.png")
    draw_extremes(model, images, rows, missed, log.folder)
    return scores


def draw_extremes(
    model: FusionUNet, images: LEVIRCD, rows: list[dict], missed: list[tuple[float, int, int, int]], folder: Path
) -> None:
    """Draw worst.png and best.png, whole images; and missed.png, windows around objects.

    Args:
        model: whose predictions they are.
        images: the split.
        rows: of `score`, an image each, those with the most wrong pixels first.
        missed: of each missed object how clearly it was, the index of its image, its middle's row and column.
        folder: where to draw them.
    """
    half = -(-len(rows) // 2)
    best = sorted(rows[half:], key=lambda row: row["labelled_pixels"] - row["wrong_pixels"], reverse=True)
    chosen = []
    for _, index, y, x in sorted(missed, reverse=True):
        # One that is near stands in the same window.
        if len(chosen) < 10 and all(index != i or max(abs(y - v), abs(x - u)) > 32 for i, v, u in chosen):
            chosen.append((index, y, x))
    sheets = {
        "worst.png": ([row["index"] for row in rows[: min(10, half)]], None),
        "best.png": ([row["index"] for row in best[:10]], None),
        "missed.png": ([index for index, *_ in chosen], [middle for _, *middle in chosen]),
    }
    for name, (items, middles) in sheets.items():
        if items:
            plot_predictions(model, images, model.mean.device, path=folder / name, items=items, middles=middles)


def load(data: LEVIRCD, config: SimpleNamespace, device: torch.device) -> DataLoader:
    """This process's share of a data set: of each batch to train on, of the batches to evaluate."""
    if data.augment:
        batches = RandomBatches(len(data), config.BATCH_SIZE, rank(), world())
    else:  # of at most as many pixels as it trains on in a step, for which it has memory
        pixels = config.BATCH_SIZE // world() * (config.CROP_SIZE or PROTOCOL_CROP) ** 2
        batches = data.batches(pixels)[rank() :: world()]
    return make_loader(data, batches, config.NUM_WORKERS, device.type == "cuda")


def pairs_of(config: SimpleNamespace, split: str, crop_size: int | None = None, augment: bool = False) -> LEVIRCD:
    """A split's data set."""
    how = config.CACHE_DIR, config.NUM_CLASSES, config.IGNORE, config.FOLDERS.split(), config.SWAP_DATES
    return LEVIRCD(config.DATA_DIR, split, crop_size, augment, *how)


def best_index(rows: Sequence[dict[str, float]], anything_to_find: bool) -> int:
    """The best of some epochs: highest validation IoU, ties broken by lower loss; loss alone where no mask has change.

    Of equals in both it is the first.
    """
    merits = [(row["val_iou"] if anything_to_find else 0.0, -row["val_loss"]) for row in rows]
    return merits.index(max(merits))


@torch.no_grad()
def settle(model: FusionUNet, loader: DataLoader, jitter: Callable[[Tensor], Tensor]) -> None:
    """Take BatchNorm's statistics anew, over up to 20 steps of training crops.

    Early in a training the weights move too fast for running averages to follow, which, with few steps an epoch, are
    also mostly what they began with.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS) and module.weight.requires_grad]
    momenta = [norm.momentum for norm in norms]
    model.train()
    device = model.mean.device
    for step, batch in enumerate(itertools.islice(loader, 20), 1):
        for norm in norms:
            norm.momentum = 1 / step  # the mean of all steps; None does the same, but reads a counter in each layer
        images = jitter(torch.cat([image.to(device) for image in batch[:2]]))
        with model.autocast():
            model(*images.chunk(2))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def warn(data: dict[str, LEVIRCD], config: SimpleNamespace) -> None:
    """Say what will hold a training back."""
    steps = max(1, len(data["train"]) // config.BATCH_SIZE)
    for split in ("train", "val"):
        if not data[split].has_change:
            so = "there is nothing to learn from" if split == "train" else "the best epoch is picked by the loss"
            say(f"{config.DATA_DIR}: no mask of {split} holds any change, so {so}")
    if steps < 10:
        say(f"BATCH_SIZE={config.BATCH_SIZE} leaves {steps} steps an epoch: lower it, or raise EPOCHS")


def warmup_cosine(step: int, warmup: float, steps: int) -> float:
    """Factor of the peak learning rate: a linear rise over `warmup` steps, then a half cosine to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, steps - warmup)))) / 2


def prefixed(split: str, scores: dict[str, float]) -> dict[str, float]:
    """The scores under the names `split_score`."""
    return {f"{split}_{name}": value for name, value in scores.items()}


# The constants


class OptionError(DataError):
    """A constant, or a value of one, that can't be; the message says what can."""


def configure(overrides: dict[str, object]) -> tuple[SimpleNamespace, dict]:
    """The constants with the overrides put in, and how the run began: `demo`, and of one to resume its whole record."""
    for name in overrides.keys() - ALLOWED.keys():
        near = difflib.get_close_matches(name.upper(), ALLOWED, 1)
        hint = f"; did you mean {near[0]}?" if near else ";"
        raise OptionError(f"{name}: no such constant{hint} python main.py --help lists them")
    constants = {name: globals().get(name, "") for name in ALLOWED} | overrides
    constants = {name: checked(name, value) for name, value in constants.items()}
    given = {name: constants[name] for name in overrides}
    folder, checkpoint, began = constants["RESUME"], constants["EVALUATE"], {"demo": False}
    if checkpoint is not None and Path(checkpoint).expanduser().is_dir():
        checkpoint = f"{checkpoint}/best.pt"
    if folder is not None:
        began = recorded(folder, given)
        constants |= began["constants"] | given
    elif checkpoint is not None and (record := Path(checkpoint).with_name("constants.json")).is_file():
        trained = json.loads(record.read_text(encoding="utf-8"))
        taken = trained["constants"].keys() & constants.keys() - set(OF_EACH_RUN)
        constants |= {name: trained["constants"][name] for name in taken} | given
        began["demo"] = trained["demo"] and "DATA_DIR" not in given
    elif "DATA_DIR" not in given and constants["DATA_DIR"] == "data":
        began["demo"] = not holds_data(constants)
    if folder is None and (name := constants["RUN_NAME"]) and rank() == 0 and Path("runs", name).exists():
        raise OptionError(f"RUN_NAME={name}: that folder of runs/ is there already; name another")
    if checkpoint is None and constants["SPLIT"] != "test":
        raise OptionError(f"SPLIT={constants['SPLIT']}: only together with EVALUATE; a training run scores test")
    if (pairs := constants["BATCH_SIZE"]) % world():
        raise OptionError(f"BATCH_SIZE={pairs}: must be a multiple of the {world()} processes")
    if len(constants["FOLDERS"].split()) != 3:
        raise OptionError(f"FOLDERS={constants['FOLDERS']}: must be three names, as in 'A B label'")
    if began["demo"] and folder is None and checkpoint is None:
        constants |= use_demo(constants, overrides)
    for name in ("DATA_DIR", "CACHE_DIR", "RESUME", "EVALUATE"):
        constants[name] = constants[name] and os.path.expanduser(constants[name])
    return SimpleNamespace(**constants | {"RESUME": folder and os.path.expanduser(folder)}), began


def holds_data(constants: dict[str, object]) -> bool:
    """Whether data/ holds a data set; OptionError where it holds images of another layout, or another data/ does."""
    if any(Path("data", split).is_dir() for split in {"train", constants["SPLIT"]}):
        return True
    for folder in {Path("data").resolve(), Path(__file__).parent / "data"}:
        for path in folder.rglob("*"):
            parts = path.relative_to(folder).parts
            if path.suffix.lower() in SUFFIXES and not parts[0].startswith(("demo", "cache")):
                looked_for = f"{Path('data', 'train').resolve()}/{{{','.join(constants['FOLDERS'].split())}}}"
                raise OptionError(f"{path}: images, but not where they are looked for, in {looked_for}: move them, or "
                                  "give DATA_DIR and FOLDERS (see data/README.md)")  # fmt: skip
    return False


def use_demo(constants: dict[str, object], overrides: dict[str, object]) -> dict[str, object]:
    """The demo's constants, where the user's don't differ from what they came as; draws it where it isn't yet."""
    used = {name: demo for name, (came_as, demo) in DEMO.items()
            if name not in overrides and constants[name] == came_as}  # fmt: skip
    if (classes := constants["NUM_CLASSES"]) != 1:
        used["DATA_DIR"] += "_classes"
        if classes != 3:
            raise OptionError(f"NUM_CLASSES={classes}: there is no data in data, and the demo has 1 class or 3")
    shown = ", ".join(f"{name}={(constants | used)[name]}" for name in DEMO)
    say(f"NO DATA in data (see data/README.md): USING THE DEMO with {shown}")
    if not Path(used["DATA_DIR"]).is_dir():
        try:
            from data.make_demo import make_demo  # here alone: who mounts a disk over data/ has no demo to draw
        except ImportError as error:
            raise OptionError("DATA_DIR=data: no train in it, nor make_demo.py to draw a demo: give another") from error
        make_demo(used["DATA_DIR"], num_classes=classes)
    return used


def checked(name: str, value: object) -> object:
    """The value of a constant as the program has it, from a person's Python or command line.

    Raises:
        OptionError: it has another type or lies outside its bounds.
    """
    kind, *bounds = ALLOWED[name]
    optional = None in bounds
    if isinstance(value, str) and (kind is not str or value == "None"):
        with contextlib.suppress(ValueError, SyntaxError):  # what is no literal stays text, which is refused below
            value = ast.literal_eval(value)
    if kind is float and type(value) is int:
        value = float(value)
    if value is None and optional:
        return None
    words = {str: "text", bool: "True or False", int: "a whole number", float: "a number"}[kind]
    if bounds and bounds[0] is not None:
        least, most = bounds[:2]
        words += f" from {least} to {most}" if most < LARGEST else f", {least} or more"
        valid = type(value) is kind and least <= value <= most
    else:
        valid = type(value) is kind and value != ""
    if not valid:
        raise OptionError(f"{name}={value}: must be {words}{', or None' * optional}")
    if name in ("RUN_NAME", "SPLIT") and Path(value).name != value:
        raise OptionError(f"{name}={value}: must be a name, not a path")
    return value


def recorded(folder: str, overrides: dict[str, object]) -> dict:
    """The record of a run that shall go on with some of its constants changed."""
    try:
        record = json.loads(Path(folder, "constants.json").expanduser().read_text(encoding="utf-8"))
        began = record["constants"]
        scored, epochs = began["EVALUATE"], began["EPOCHS"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise OptionError(f"RESUME={folder}: not the folder of a run ({error}); give one of runs/") from error
    if scored is not None:
        raise OptionError(f"RESUME={folder}: this run scored a checkpoint and is done; give EVALUATE again")
    for name, value in overrides.items():
        if name != "RESUME" and name not in CHANGEABLE and value != began.get(name):
            changeable = ", ".join(CHANGEABLE)
            raise OptionError(f"{name}={value}: the run began with {began.get(name)}; only {changeable} may change")
    if overrides.get("EPOCHS", epochs) < epochs:
        raise OptionError(f"EPOCHS={overrides['EPOCHS']}: may be raised, but the run began with {epochs}")
    return record


def from_command_line(arguments: Sequence[str]) -> dict[str, str]:
    """`NAME=value` as `main` takes it; where help is asked for, prints the constants and ends the program."""
    if {"-h", "--help", "help"} & set(arguments):
        source = Path(__file__).read_text(encoding="utf-8")
        constants = source[source.index("# DATA\n") : source.index("# What each constant may be")]
        print(f"{__doc__}\n\nThe constants, as they stand in main.py:\n\n{constants.rstrip()}")
        sys.exit()
    for argument in arguments:
        if "=" not in argument:
            raise OptionError(f"{argument}: give NAME=value; python main.py --help lists the names")
    return dict(argument.split("=", 1) for argument in arguments)


# The folder of a run


@contextlib.contextmanager
def run_folder(config: SimpleNamespace, record: dict) -> Iterator[Path]:
    """The folder of the run, new or gone on with, its record in it, kept from other processes meanwhile.

    Raises:
        OSError: another process is at this run, or the folder can't be written.
    """
    folder = Path(config.RESUME or Path("runs", config.RUN_NAME or time.strftime("%Y-%m-%d_%H-%M-%S")))
    while not config.RESUME:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # two that started within a second
            folder = folder.with_name(folder.name + "_2")
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # for as long as this process lives, its workers apart
        except (BlockingIOError, PermissionError) as error:
            raise OSError(f"{folder}: another process is at this run; wait for its end") from error
        for part in folder.glob("*.part"):  # left by a process that was killed
            part.unlink()
        with written_whole(folder / "constants.json") as file:
            file.write(json.dumps(record, indent=2) + "\n")
        yield folder


def describe(config: SimpleNamespace, began: dict, device: torch.device, data: dict[str, LEVIRCD]) -> dict:
    """What is recorded of a run; DataError where the data are not those that it began with."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = ""
    with contextlib.suppress(OSError):  # no git
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    packages = ("torchvision", "numpy", "pillow", "matplotlib", "mlflow")
    record = {
        "constants": vars(config) | {"RESUME": None},
        "demo": began["demo"],
        "id": began.get("id", uuid.uuid4().hex),
        "data": {split: items.fingerprint() for split, items in data.items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "git": commit or "unknown",
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {package: importlib.metadata.version(package) for package in packages},
    }
    comparable = ("data", "device", "git", "versions")
    differing = [name for name in comparable if began.get(name, record[name]) != record[name]]
    if "data" in differing:
        raise DataError(f"{config.DATA_DIR}: not the files that {config.RESUME} began with; bring those back")
    if differing:
        say(f"{', '.join(differing)}: not as when the run began; its scores may differ in the last digits")
    return record


def last_checkpoint(folder: str | None) -> dict | None:
    """`last.pt` of a run to resume; None where no epoch was finished."""
    if folder is None or not Path(folder, "last.pt").exists():
        return None
    try:
        last = read_checkpoint(Path(folder, "last.pt"))
    except ModelError as error:
        reason = str(error).partition(";")[0]
        raise ModelError(
            f"{reason}; without it RESUME begins with the first epoch; best.pt is a file of its own"
        ) from error
    if "step" not in last["rows"][-1]:
        raise ModelError(f"RESUME={folder}: begun by an older program with other optimizers: go on with that one")
    return last


# Several processes, one a GPU, as torchrun starts them


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """The block in one group with the other processes, if there are some."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    yield
    leave_group()  # not after an error: to leave, others may be waited for, that wait for this one


def leave_group() -> None:
    """Go on alone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 logs and saves."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def first_of_machine() -> Iterator[None]:
    """The block in the first process of each machine, then in the others: it fetches, decodes and complains for all."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    # A large data set takes hours to decode; whatever else is waited for, minutes.
    patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1)) if world() > 1 else None
    if patient and not is_first:
        dist.barrier(patient)
    yield
    if patient and is_first:
        dist.barrier(patient)


def wrapped(model: FusionUNet, pairs: int, compiled: bool) -> nn.Module:
    """The model to train with, whose gradients are of all processes' pairs, of which this one has so many."""
    parallel = model
    if dist.is_initialized():
        if model.mean.is_cuda and pairs < ENOUGH_PAIRS:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place; there is none for the CPU
        parallel = nn.parallel.DistributedDataParallel(model)
        # `evaluate` sends the first process's statistics to the others; only there are they used.
        parallel.broadcast_buffers = False  # torch 2.14 renamed the argument, not the attribute
    return torch.compile(parallel) if compiled else parallel


def say(line: str) -> None:
    """Print it once, however many processes there are."""
    if rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    try:
        main(**from_command_line(sys.argv[1:]))
    except Exception as error:
        if (line := explanation(error, memory="BATCH_SIZE or CROP_SIZE")) is None:
            raise
        sys.exit(f"error: {line}")
