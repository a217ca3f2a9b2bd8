"""Train FusionUNet on LEVIR-CD: `python main.py`, or `python main.py CONSTANT=value …` to change a constant once."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import sys
import time
import typing
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import processes
from data.files import read_checkpoint, save, written_whole
from data.make_demo import make_demo
from data.optimizers import make_optimizers
from data.options import OptionError, checked, explanation, has_bfloat16, parse, pick_device, recorded, typed
from data.runs import RunLog, describe, last_checkpoint, new_folder
from dataset import LEVIRCD, color_jitter, make_loader
from losses import CombinedIoULoss, LossReader
from metrics import ChangeMetrics, ThresholdMetrics, as_logits, as_table
from model import FusionUNet
from visualize import plot_curves, plot_precision_recall, plot_predictions

# DATA
DATA_DIR: str = "data"  # holds train, val and, if there is one, test; a demo stands in for a missing data/train
CACHE_DIR: str | None = "data/cache"  # decoded pairs, 7 bytes a pixel (4.7 GB for LEVIR-CD); None: decode each time
NUM_CLASSES: int = 1  # of change; 1: masks hold 0 and 255; more: 0 to this number, and the order of the dates counts
CROP_SIZE: int | None = 256  # pixels, a side, in training and in validation; None: whole images
BRIGHTNESS: float = 0.1  # colour jitter, drawn for each image: factor 1 ± this; 0: off
CONTRAST: float = 0.1  # likewise
SATURATION: float = 0.1  # likewise
HUE: float = 0.01  # likewise, as ± a share of the colour circle, up to 0.5; 0: off

# MODEL
BACKBONE: str = "resnet50"  # torchvision's name: "resnet18", "convnext_tiny", "swin_t" or others with four strides
WEIGHTS: str | None = "IMAGENET1K_V1"  # the backbone's in torchvision, fetched once (98 MB); None: untrained
FREEZE_BACKBONE: bool = True  # False trains the backbone too: 26 M parameters instead of 2.5 M

# OPTIMISATION
BATCH_SIZE: int = 16  # pairs a step, of all GPUs together; halve it when their memory runs out
EPOCHS: int = 100  # passes over the training split, 7,120 crops of 256 each for LEVIR-CD
LEARNING_RATE: float = 3e-3  # its peak, for Muon (new convolutions) and AdamW; a trained backbone has a tenth
WEIGHT_DECAY: float = 1e-2  # decoupled; 0: off
WARMUP_EPOCHS: float = 1.0  # the learning rate rises this long, then falls as a cosine to 0; 0: off
CLIP_NORM: float = 1.0  # largest norm of a step's gradient; 0: off
ALPHA: float = 0.5  # weight of cross-entropy in the loss, the rest is soft IoU; 0..1

# RUNTIME
DEVICE: str | None = None  # "cuda", "cuda:1", "cpu"; None: the GPU where there is one
AMP: bool = True  # bfloat16 autocast in training, where the device computes in it by itself; False: float32
COMPILE: bool = False  # torch.compile for the training step: begins a minute or two later, and is slower on a CPU
NUM_WORKERS: int | None = None  # processes that load data; None: by the cores on a GPU, 0 on the CPU
SEED: int = 0  # of the weights, the order, the crops and the colours
DETERMINISTIC: bool = False  # True: the same bits again on CUDA too, slower; the CPU gives them in any case
RESUME: str | None = None  # folder of a run to go on with, such as runs/RUN; None: a new run
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
        FloatingPointError: the loss isn't finite any more.
        OSError: something can't be written.
    """
    with processes.joined():
        with processes.first_of_machine():
            config, began = configure(overrides)
            device = pick_device(config.DEVICE)
            torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
            torch.use_deterministic_algorithms(config.DETERMINISTIC)
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic algorithms need
            torch.manual_seed(config.SEED)
            if config.EVALUATE is not None:
                model = FusionUNet.load(config.EVALUATE, device)
                if (classes := model.head.out_channels) != config.NUM_CLASSES:
                    raise OptionError(f"NUM_CLASSES={config.NUM_CLASSES}: give {classes}, as {config.EVALUATE} has")
            loaders = make_loaders(config, device)
            record = describe(config, began, device, loaders)
            last = last_checkpoint(config.RESUME)
            if config.EVALUATE is None:
                weights = None if last else config.WEIGHTS
                model = FusionUNet(weights, config.FREEZE_BACKBONE, config.NUM_CLASSES, config.BACKBONE)
                model.to(device, memory_format=torch.channels_last)
        if not processes.is_main():
            return {} if config.EVALUATE else prefixed("val", fit(model, loaders, config, None, last))
        folder = Path(config.RESUME) if config.RESUME else new_folder(config.RUN_NAME)
        with RunLog(folder, record, last["rows"] if last else ()) as log:
            if config.EVALUATE is not None:
                processes.leave()
                return evaluate(model, loaders[config.SPLIT], config, log)
            try:
                return train_and_score(model, loaders, config, log, last)
            except BaseException as error:
                if not isinstance(error, FloatingPointError | torch.OutOfMemoryError):  # which would come again
                    print(f"the run can go on: python main.py RESUME={folder}", flush=True)
                raise


def make_loaders(config: SimpleNamespace, device: torch.device) -> dict[str, DataLoader]:
    """The loaders by split: train, val and, if it is there, test; of a run that only scores, that split's."""
    crop_sizes = {"train": config.CROP_SIZE, "val": config.CROP_SIZE, "test": PROTOCOL_CROP}
    if config.EVALUATE is not None:
        crop_sizes = {config.SPLIT: PROTOCOL_CROP}
    elif not Path(config.DATA_DIR, "test").is_dir():
        del crop_sizes["test"]
    augmented = "train" if config.EVALUATE is None else None
    return {
        split: make_loader(
            LEVIRCD(config.DATA_DIR, split, crop_size, split == augmented, config.CACHE_DIR, config.NUM_CLASSES),
            config.BATCH_SIZE, config.NUM_WORKERS, device.type == "cuda",
        )
        for split, crop_size in crop_sizes.items()
    }  # fmt: skip


def train_and_score(
    model: FusionUNet, loaders: dict[str, DataLoader], config: SimpleNamespace, log: RunLog, last: dict | None
) -> dict[str, float]:
    """Train up to EPOCHS, then draw and score the best epoch's model; returns the scores."""
    sizes = ", ".join(f"{len(loader.dataset)} {split}" for split, loader in loaders.items())
    several = f"{processes.count()} × " if processes.count() > 1 else ""
    print(f"{log.folder}: {sizes} items of {config.DATA_DIR} on {several}{log.record['device']}", flush=True)
    log.send(timeout=10)
    scores = prefixed("val", fit(model, loaders, config, log, last))
    processes.leave()
    best = FusionUNet.load(log.folder / "best.pt", next(model.parameters()).device)
    draw_best(best, loaders["val"].dataset, log.folder)
    if "test" in loaders:
        scores |= evaluate(best, loaders["test"], config, log)
    print(f"the best epoch's validation IoU: {scores['val_iou']:.4f}; see {log.folder}: best.pt, metrics.csv and more")
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
        splits = {"train", str(given["SPLIT"])} if given["EVALUATE"] else {"train"}
        there = any(Path(DATA_DIR, split).is_dir() for split in splits)
        demo = "DATA_DIR" not in overrides and DATA_DIR == "data" and not there
        began, constants = {"demo": demo}, constants | DEMO | overrides if demo else given
        if demo and (classes := constants["NUM_CLASSES"]) != 1:
            constants["DATA_DIR"] += "_classes"
            if classes != 3:
                raise OptionError(f"NUM_CLASSES={classes}: there is no data in data, and the demo has 1 class or 3")
        if processes.is_main() and given["RUN_NAME"] and Path("runs", str(given["RUN_NAME"])).exists():
            raise OptionError(f"RUN_NAME={given['RUN_NAME']}: that folder of runs/ is there already; name another")
    constants = {name: checked(name, constants[name], hint) for name, hint in hints.items()}
    if constants["EVALUATE"] is None and constants["SPLIT"] != "test":
        raise OptionError(f"SPLIT={constants['SPLIT']}: only together with EVALUATE; a training run scores test")
    if (pairs := constants["BATCH_SIZE"]) % processes.count():
        raise OptionError(f"BATCH_SIZE={pairs}: must be a multiple of the {processes.count()} processes")
    if began["demo"]:
        used = ", ".join(f"{name}={constants[name]}" for name in DEMO)
        print(f"NO DATA in data (see data/README.md): USING THE DEMO with {used}", flush=True)
        if not Path(constants["DATA_DIR"]).is_dir():
            make_demo(constants["DATA_DIR"], num_classes=constants["NUM_CLASSES"])
    return SimpleNamespace(**constants | {"RESUME": given["RESUME"]}), began


def fit(
    model: FusionUNet, loaders: dict[str, DataLoader], config: SimpleNamespace, log: RunLog | None, last: dict | None
) -> dict[str, float]:
    """Train up to EPOCHS, from the checkpoint `last` on if there is one, and validate after each epoch.

    Returns:
        The validation scores of the epoch in best.pt; the process with the log, one of several, saves it.
    """
    optimizers = make_optimizers(model, config.LEARNING_RATE, config.WEIGHT_DECAY)
    best, done = {"iou": -1.0}, 0
    if last:
        model.load_state_dict(last["model"])
        for optimizer, state in zip(optimizers, last["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        best, done = read_checkpoint(Path(config.RESUME, "best.pt"))["scores"], last["epoch"]
    steps, warmup = config.EPOCHS * len(loaders["train"]), config.WARMUP_EPOCHS * len(loaders["train"])
    last_step = done * len(loaders["train"]) - 1
    schedulers = [LambdaLR(each, lambda step: warmup_cosine(step, warmup, steps), last_step) for each in optimizers]
    trained = processes.parallel(model)
    if config.COMPILE:
        trained = torch.compile(trained)
    for epoch in range(done + 1, config.EPOCHS + 1):
        # An epoch's order, crops and colours follow from the seed and its number alone.
        torch.manual_seed(int(np.random.SeedSequence([config.SEED, epoch]).generate_state(1)[0]))
        counts, metrics = ChangeMetrics(config.NUM_CLASSES), ThresholdMetrics(config.NUM_CLASSES)
        learning_rate = schedulers[0].get_last_lr()[0]
        train = run_pass(trained, loaders["train"], config, counts, optimizers, schedulers, f"epoch {epoch}")
        val = run_pass(model, loaders["val"], config, metrics, name="validation")
        model.threshold = metrics.best_threshold()
        is_best = val["iou"] > best["iou"]
        best = val if is_best else best
        if log is None:
            continue
        row = prefixed("train", train) | prefixed("val", val) | {"learning_rate": learning_rate}
        keep(model, optimizers, loaders["val"].dataset, log, row, is_best)
        print(
            f"epoch {epoch}/{config.EPOCHS}: train loss {train['loss']:.4f}, IoU {train['iou']:.4f}; val loss "
            f"{val['loss']:.4f}, IoU {val['iou']:.4f}, Dice {val['dice']:.4f}; {train['pairs_per_second']:.1f} pairs/s"
            f"{', the best so far' if is_best else ''}",
            flush=True,
        )
    return best


def keep(
    model: FusionUNet, optimizers: Sequence[Optimizer], dataset: LEVIRCD, log: RunLog, row: dict, is_best: bool
) -> None:
    """Log and save an epoch."""
    epoch, device = len(log.rows) + 1, model.mean.device
    if device.type == "cuda":
        row["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    picture = log.folder / "predictions" / f"epoch_{epoch:03}.png"
    plot_predictions(model, dataset, device, num_samples=4, path=picture)
    log.epoch(row, picture)
    scores = {name.removeprefix("val_"): value for name, value in row.items() if name.startswith("val_")}
    checkpoint = model.checkpoint() | {"epoch": epoch, "scores": scores}
    if is_best:
        save(checkpoint, log.folder / "best.pt")
    states = [optimizer.state_dict() for optimizer in optimizers]
    save(checkpoint | {"optimizers": states, "rows": log.rows}, log.folder / "last.pt")
    log.send()


def run_pass(
    model: FusionUNet, loader: DataLoader, config: SimpleNamespace, metrics: ChangeMetrics,
    optimizers: Sequence[Optimizer] = (), schedulers: Sequence[LRScheduler] = (), name: str = "",
) -> dict[str, float]:  # fmt: skip
    """One pass over a loader: training where optimizers are given, evaluation otherwise.

    Returns:
        `loss`, the mean over the pairs, what `metrics` computes, and `pairs_per_second`; of all processes together.

    Raises:
        FloatingPointError: the loss of a step isn't finite; seen in the next one.
    """
    training, device = bool(optimizers), next(model.parameters()).device
    model.train(training)
    criterion, losses, start = CombinedIoULoss(config.ALPHA), LossReader(name, loader, device), time.perf_counter()
    loss_sum, pairs = torch.zeros((), device=device), 0
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.AMP and has_bfloat16(device))
    bar = tqdm(total=len(loader.dataset), desc=name, unit="pair", leave=False, disable=None)
    with torch.set_grad_enabled(training), bar:
        for batch in loader:
            interrupt.in_step = True
            image_a, image_b, label = (tensor.to(device, non_blocking=True) for tensor in batch)
            if training:
                strengths = config.BRIGHTNESS, config.CONTRAST, config.SATURATION, config.HUE
                image_a, image_b = color_jitter(image_a, *strengths), color_jitter(image_b, *strengths)
            with autocast:
                logits = model(image_a, image_b)
            loss = criterion(logits, label)
            if training:
                learn(loss, model, optimizers, schedulers, config.CLIP_NORM)
            metrics.update(logits.detach(), label)
            loss_sum += loss.detach() * len(label)
            pairs += len(label)
            bar.set_postfix(loss=f"{losses.exchange(loss):.4f}", refresh=False)
            bar.update(processes.count() * len(label))
            interrupt.in_step = False
            if interrupt.signal:
                sys.exit(128 + interrupt.signal)
        losses.last()
    metrics.sum_processes()
    loss_sum, pairs = processes.summed(torch.tensor([loss_sum.item(), pairs], dtype=torch.float64)).tolist()
    return {"loss": loss_sum / pairs, **metrics.compute(), "pairs_per_second": pairs / (time.perf_counter() - start)}


def learn(
    loss: Tensor, model: nn.Module, optimizers: Sequence[Optimizer], schedulers: Sequence[LRScheduler], clip_norm: float
) -> None:
    """One step down the loss's gradient."""
    model.zero_grad()
    loss.backward()
    if clip_norm:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    for steps in (*optimizers, *schedulers):
        steps.step()


def evaluate(model: FusionUNet, loader: DataLoader, config: SimpleNamespace, log: RunLog) -> dict[str, float]:
    """Score a split in crops of 256 pixels, as the field does, and in whole images, as users see them.

    Returns:
        The split's scores in crops at 0.5 (`test_iou`) and at the checkpoint's threshold (`test_tuned_iou`), of whole
        images (`test_whole_iou`, `test_whole_tuned_iou`), `test_average_precision` and `test_threshold`.
    """
    crops, whole = (ThresholdMetrics(config.NUM_CLASSES) for _ in range(2))
    split, rows = loader.dataset.folder.name, []
    run_pass(model, loader, SimpleNamespace(**vars(config) | {"AMP": False}), crops, name=split)  # as `predict` does
    images = LEVIRCD(config.DATA_DIR, split, cache_dir=config.CACHE_DIR, num_classes=config.NUM_CLASSES)
    for index in tqdm(range(len(images)), desc=f"{split}, whole images", unit="pair", leave=False, disable=None):
        image_a, image_b, label = images[index]
        logits, image = as_logits(model.predict(image_a, image_b)), ChangeMetrics(config.NUM_CLASSES)
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
    title = f"{split} split, crops of {PROTOCOL_CROP}"
    plot_precision_recall(crops.curve(), (0.5, model.threshold), title, log.folder / "precision_recall.png")
    for name, items in (("worst.png", order[:10]), ("best.png", order[:-11:-1])):
        plot_predictions(model, images, model.mean.device, path=log.folder / name, items=items)
    return scores


def warmup_cosine(step: int, warmup: float, steps: int) -> float:
    """Factor of the peak learning rate: a linear rise over `warmup` steps, then a half cosine to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, steps - warmup)))) / 2


def draw_best(model: FusionUNet, dataset: LEVIRCD, folder: Path) -> None:
    """Draw a run's curves and what its best model predicts in validation."""
    plot_curves(folder / "metrics.csv", folder / "curves.png")
    picture = folder / "validation_predictions.png"
    plot_predictions(model, dataset, model.mean.device, path=picture)
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
    except Exception as error:
        if interrupt.signal and isinstance(error, RuntimeError):  # another process of torchrun's was a step ahead
            sys.exit(128 + interrupt.signal)
        if (line := explanation(error, memory="BATCH_SIZE or CROP_SIZE")) is None:
            raise
        sys.exit(f"error: {line}")
