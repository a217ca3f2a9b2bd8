"""Train FusionUNet on LEVIR-CD: `python main.py`, or `python main.py CONSTANT=value …` to change a constant once."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
import signal
import sys
import time
import typing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.checkpoints import read_checkpoint
from data.make_demo import make_demo
from data.runs import RunLog, describe, last_checkpoint, new_folder, written_whole
from dataset import LEVIRCD, DataError, color_jitter, make_loader
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
DETERMINISTIC: bool = False  # True: the same bits again on CUDA too, slower; the CPU gives them in any case
RESUME: str | None = None  # folder of a run to go on with, such as runs/RUN; None: a new run
RUN_NAME: str | None = None  # folder under runs/; None: date and time
EVALUATE: str | None = None  # checkpoint to score instead of training, such as runs/RUN/best.pt; None: train
SPLIT: str = "test"  # what EVALUATE scores; a training run ends with the scores of test, where it is there

# What may be changed when a run goes on; anything else would make it another experiment.
CHANGEABLE = ("EPOCHS", "DATA_DIR", "CACHE_DIR", "DEVICE", "NUM_WORKERS")
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
        FloatingPointError: the loss isn't finite any more.
        OSError: something can't be written.
    """
    config, began = configure(overrides)
    device = pick_device(config.DEVICE)
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
    torch.use_deterministic_algorithms(config.DETERMINISTIC)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic algorithms need
    torch.manual_seed(config.SEED)

    def load(split: str, crop_size: int | None, augment: bool = False) -> DataLoader:
        dataset = LEVIRCD(config.DATA_DIR, split, crop_size, augment, config.CACHE_DIR)
        return make_loader(dataset, config.BATCH_SIZE, config.NUM_WORKERS, device.type == "cuda")

    if config.EVALUATE is not None:
        model, loader = FusionUNet.load(config.EVALUATE, device), load(config.SPLIT, PROTOCOL_CROP)
        record = describe(config, began, device, {config.SPLIT: loader})
        with RunLog(new_folder(config.RUN_NAME), record) as log:
            return evaluate(model, loader, config, log)

    loaders = {"train": load("train", config.CROP_SIZE, augment=True), "val": load("val", config.CROP_SIZE)}
    if Path(config.DATA_DIR, "test").is_dir():
        loaders["test"] = load("test", PROTOCOL_CROP)
    record = describe(config, began, device, loaders)
    last = last_checkpoint(config.RESUME)
    model = FusionUNet(None if last else config.WEIGHTS, config.FREEZE_BACKBONE)
    model.to(device, memory_format=torch.channels_last)
    folder = Path(config.RESUME) if config.RESUME else new_folder(config.RUN_NAME)
    sizes = ", ".join(f"{len(loader.dataset)} {split}" for split, loader in loaders.items())
    print(f"{folder}: {sizes} items of {config.DATA_DIR} on {record['device']}", flush=True)
    with RunLog(folder, record, last["rows"] if last else ()) as log:
        try:
            log.send(timeout=10)
            scores = prefixed("val", fit(model, loaders, config, log, last))
            best = FusionUNet.load(folder / "best.pt", device)
            draw_best(best, loaders["val"].dataset, folder)
            if "test" in loaders:
                scores |= evaluate(best, loaders["test"], config, log)
        except BaseException as error:
            if not isinstance(error, FloatingPointError | torch.OutOfMemoryError):  # which would come again
                print(f"the run can go on: python main.py RESUME={folder}", flush=True)
            raise
    print(f"the best epoch's validation IoU: {scores['val_iou']:.4f}; see {folder}: best.pt, metrics.csv and more")
    return scores


def configure(overrides: dict[str, object]) -> tuple[SimpleNamespace, dict]:
    """The constants with the overrides put in, and how the run began: `demo`, and of one to resume its whole record."""
    hints = typing.get_type_hints(sys.modules[__name__])
    constants = {name: globals()[name] for name in hints}
    if unknown := overrides.keys() - constants.keys():
        raise OptionError(f"{', '.join(unknown)}: no such constant; there are {', '.join(constants)}")
    given = constants | overrides
    if given["RESUME"] is not None:
        began = recorded(typed("RESUME", given["RESUME"], str), overrides)
        constants |= began["constants"] | overrides
    else:
        needed = given["SPLIT"] if given["EVALUATE"] else "train"
        demo = "DATA_DIR" not in overrides and DATA_DIR == "data" and not Path(DATA_DIR, str(needed)).is_dir()
        began, constants = {"demo": demo}, constants | DEMO | overrides if demo else given
        if given["RUN_NAME"] and Path("runs", str(given["RUN_NAME"])).exists():
            raise OptionError(f"RUN_NAME={given['RUN_NAME']}: that folder of runs/ is there already; name another")
    constants = {name: checked(name, constants[name], hint) for name, hint in hints.items()}
    if constants["EVALUATE"] is None and constants["SPLIT"] != "test":
        raise OptionError(f"SPLIT={constants['SPLIT']}: only together with EVALUATE; a training run scores test")
    if began["demo"]:
        used = ", ".join(f"{name}={constants[name]}" for name in DEMO)
        print(f"NO DATA in data (see data/README.md): USING THE DEMO with {used}", flush=True)
        if not Path(constants["DATA_DIR"]).is_dir():
            make_demo(constants["DATA_DIR"])
    return SimpleNamespace(**constants | {"RESUME": given["RESUME"]}), began


def recorded(folder: str, overrides: dict[str, object]) -> dict:
    """The record of a run that shall go on with some of its constants changed."""
    try:
        record = json.loads(Path(folder, "constants.json").read_text())
        began = record["constants"]
        if began["EVALUATE"] is not None:
            raise OptionError(f"RESUME={folder}: this run scored a checkpoint and is done; give EVALUATE again")
    except (OSError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"RESUME={folder}: not the folder of a run ({error}); give one of runs/") from error
    for name, value in overrides.items():
        if name != "RESUME" and name not in CHANGEABLE and value != began.get(name):
            changeable = ", ".join(CHANGEABLE)
            raise OptionError(f"{name}={value}: the run began with {began.get(name)}; only {changeable} may change")
    if isinstance(epochs := overrides.get("EPOCHS"), int) and epochs < began["EPOCHS"]:
        raise OptionError(f"EPOCHS={epochs}: may be raised, but the run began with {began['EPOCHS']}")
    return record


def checked(name: str, value: object, hint: type) -> object:
    """The value, if the constant can have it."""
    value = typed(name, value, hint)
    if isinstance(value, int | float):
        least = 1 if name in ("CROP_SIZE", "BATCH_SIZE", "EPOCHS") else 0
        most = {"ALPHA": 1, "BRIGHTNESS": 1, "CONTRAST": 1, "SATURATION": 1, "HUE": 0.5}.get(name, sys.maxsize)
        if not least <= value <= most:
            raise OptionError(f"{name}={value}: must be {least} to {most}")
    if value == "":
        raise OptionError(f"{name}=: nothing is given behind it")
    if name in ("RUN_NAME", "SPLIT") and value is not None and Path(value).name != value:
        raise OptionError(f"{name}={value}: must be a name, not a path")
    return value


def fit(
    model: FusionUNet, loaders: dict[str, DataLoader], config: SimpleNamespace, log: RunLog, last: dict | None = None
) -> dict[str, float]:
    """Train up to EPOCHS, from the checkpoint `last` on if there is one; validate, log and save after each epoch.

    Returns:
        The validation scores of the epoch in best.pt.
    """
    trainable = filter(lambda parameter: parameter.requires_grad, model.parameters())
    optimizer = torch.optim.AdamW(trainable, config.LEARNING_RATE, weight_decay=config.WEIGHT_DECAY)
    best: dict[str, float] = {"iou": -1.0}
    if last:
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        best = read_checkpoint(log.folder / "best.pt")["scores"]
    steps, warmup = config.EPOCHS * len(loaders["train"]), config.WARMUP_EPOCHS * len(loaders["train"])
    done = len(log.rows) * len(loaders["train"])
    scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, steps), last_epoch=done - 1)
    for epoch in range(len(log.rows) + 1, config.EPOCHS + 1):
        # An epoch's order, crops and colours follow from the seed and its number alone.
        torch.manual_seed(int(np.random.SeedSequence([config.SEED, epoch]).generate_state(1)[0]))
        metrics, learning_rate = ThresholdMetrics(), scheduler.get_last_lr()[0]
        train = run_pass(model, loaders["train"], config, ChangeMetrics(), optimizer, scheduler, f"epoch {epoch}")
        val = run_pass(model, loaders["val"], config, metrics, name="validation")
        is_best = val["iou"] > best["iou"]
        model.threshold = metrics.best_threshold()
        row = prefixed("train", train) | prefixed("val", val) | {"learning_rate": learning_rate}
        device = next(model.parameters()).device
        if device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        picture = log.folder / "predictions" / f"epoch_{epoch:03}.png"
        plot_predictions(model, loaders["val"].dataset, device, num_samples=4, path=picture)
        log.epoch(row, picture)
        checkpoint = model.checkpoint() | {"epoch": epoch, "scores": val}
        if is_best:
            best = val
            save(checkpoint, log.folder / "best.pt")
        save(checkpoint | {"optimizer": optimizer.state_dict(), "rows": log.rows}, log.folder / "last.pt")
        log.send()
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
        `loss`, the mean over the pairs, what `metrics` computes, and `pairs_per_second`.

    Raises:
        FloatingPointError: the loss isn't finite; in training the weights are still those before this step.
    """
    training, device = optimizer is not None, next(model.parameters()).device
    model.train(training)
    criterion, pairs, start = CombinedIoULoss(config.ALPHA), 0, time.perf_counter()
    loss_sum = torch.zeros((), device=device)
    on_host = torch.zeros((), pin_memory=device.type == "cuda")  # the last loss that came in
    arrived = torch.cuda.Event() if device.type == "cuda" else None
    bar = tqdm(total=len(loader.dataset), desc=name, unit="pair", leave=False, disable=None)
    with torch.set_grad_enabled(training), bar:
        for step, batch in enumerate(loader):
            interrupt.in_step = True
            image_a, image_b, label = (tensor.to(device, non_blocking=True) for tensor in batch)
            if training:
                strengths = config.BRIGHTNESS, config.CONTRAST, config.SATURATION, config.HUE
                image_a, image_b = color_jitter(image_a, *strengths), color_jitter(image_b, *strengths)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.AMP and device.type == "cuda"):
                logits = model(image_a, image_b)
            loss = criterion(logits, label)
            on_host.copy_(loss.detach(), non_blocking=True)
            if arrived:
                arrived.record()
            if training:
                optimizer.zero_grad()
                loss.backward()
                if arrived:
                    arrived.synchronize()  # waits for the forward pass alone; the GPU has the backward pass to do
                if not on_host.isfinite():
                    files = loader.dataset.files(loader.sampler.drawn[step * len(label) :][: len(label)])
                    raise FloatingPointError(f"{name}, step {step + 1}: the loss is {on_host}; the batch: {files}")
                if config.CLIP_NORM:
                    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.CLIP_NORM)
                optimizer.step()
                scheduler.step()
            metrics.update(logits.detach(), label)
            loss_sum += loss.detach() * len(label)
            pairs += len(label)
            bar.set_postfix(loss=f"{on_host.item():.4f}", refresh=False)
            bar.update(len(label))
            interrupt.in_step = False
            if interrupt.signal:
                sys.exit(128 + interrupt.signal)
    scores = {"loss": loss_sum.item() / pairs, **metrics.compute()}  # waits for the device, before the clock is read
    if not math.isfinite(scores["loss"]):
        raise FloatingPointError(f"{name}: the loss is {scores['loss']}")
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
    scores = prefixed(split, scores)
    log.scores(scores)
    with written_whole(log.folder / f"{split}_metrics.json") as file:
        file.write(json.dumps(scores, indent=2) + "\n")
    rows.sort(key=lambda row: row["iou"])
    order = [row.pop("index") for row in rows]
    with written_whole(log.folder / "per_image.csv") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    title, device = f"{split} split, crops of {PROTOCOL_CROP}", next(model.parameters()).device
    plot_precision_recall(crops.curve(), (0.5, model.threshold), title, log.folder / "precision_recall.png")
    plot_predictions(model, images, device, path=log.folder / "worst.png", items=order[:10])
    plot_predictions(model, images, device, path=log.folder / "best.png", items=order[:-11:-1])
    return scores


def warmup_cosine(step: int, warmup: float, steps: int) -> float:
    """Factor of the peak learning rate: a linear rise over `warmup` steps, then a half cosine to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, steps - warmup)))) / 2


def save(checkpoint: dict, path: Path) -> None:
    """Write a checkpoint; in memory first, since torch turns an error of the disk into one of its own."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with written_whole(path, "wb") as file:
        file.write(buffer.getbuffer())


def draw_best(model: FusionUNet, dataset: LEVIRCD, folder: Path) -> None:
    """Draw a run's curves and what its best model predicts in validation."""
    plot_curves(folder / "metrics.csv", folder / "curves.png")
    picture = folder / "validation_predictions.png"
    plot_predictions(model, dataset, next(model.parameters()).device, path=picture)
    Path("images").mkdir(exist_ok=True)
    with written_whole(Path("images", picture.name), "wb") as file:
        file.write(picture.read_bytes())


def prefixed(split: str, scores: dict[str, float]) -> dict[str, float]:
    """The scores under the names `split_score`."""
    return {f"{split}_{name}": value for name, value in scores.items()}


interrupt = SimpleNamespace(signal=0, in_step=False)


def take_signal(number: int, _: object) -> None:
    """SIGINT and SIGTERM end the process with 128 + their number, after the step at hand; a second one at once."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)
    interrupt.signal = number
    if not interrupt.in_step:
        sys.exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, take_signal)
    try:
        main(**parse(sys.argv[1:], typing.get_type_hints(sys.modules[__name__])))
    except (OptionError, DataError, ModelError, FloatingPointError, OSError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC  # then the message may name no file
        message = "a disk is full: free some of it, then go on" if full else str(error).splitlines()[-1]
        # The last line of several, if it comes from a worker; there it has the error's name.
        sys.exit(f"error: {re.sub(r'^[a-zA-Z.]+Error: ', '', message)}")
    except MemoryError:
        sys.exit("error: the memory ran out: lower BATCH_SIZE or CROP_SIZE")
    except torch.OutOfMemoryError as error:  # "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has … is free."
        sys.exit(f"error: {str(error).partition(' Of the allocated')[0]} Lower BATCH_SIZE or CROP_SIZE")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(f"error: a process that loads data died, perhaps for want of memory: lower NUM_WORKERS ({error})")
