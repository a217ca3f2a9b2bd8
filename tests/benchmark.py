"""How fast it is here, against what the machine can do and against the plain way: a table, and a JSON file in runs/.

    python tests/benchmark.py [cpu|cuda] [--quick]

Medians, and the range, of several calls after a warm-up. Nothing is scored: weights and images are noise.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

os.environ["KINETO_LOG_LEVEL"] = "5"  # before torch comes, whose profiler else complains where there is no GPU

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
if importlib.util.find_spec("mlflow") is None:  # speed can be measured without, and without what it brings along
    names = ("mlflow", "mlflow.entities", "mlflow.tracking.context.registry", "scipy", "scipy.ndimage")
    sys.modules |= {name: MagicMock() for name in names}
import main
from dataset import LEVIRCD, RandomBatches, color_jitter, find_pairs, make_loader
from losses import CombinedIoULoss
from metrics import ChangeMetrics
from model import FusionUNet, fast_dtype, make_optimizers, pick_device, save
from visualize import plot_predictions

ROOT = Path(__file__).parent.parent
LEVIR_CROPS = 7120  # of 256 pixels in an epoch of LEVIR-CD
JITTER = (0.1, 0.1, 0.1, 0.01)
FIRST_STEP = """
import sys, time
from torch.optim import optimizer
def stop(*_):
    print("FIRST STEP", time.time() - float(sys.argv[1]))
    raise SystemExit
optimizer.register_optimizer_step_post_hook(stop)
import main
main.main(DATA_DIR=sys.argv[2], CACHE_DIR=None, CROP_SIZE=128, WEIGHTS=None, BATCH_SIZE=1, DEVICE=sys.argv[3])
"""


class PlainUNet(FusionUNet):
    """The same network as it is often written: a pass for each date, float32, NCHW, no max-pool, nothing folded."""

    def __init__(self) -> None:
        super().__init__(weights=None, freeze_backbone=False)
        self.freeze_backbone = True
        self.stages.requires_grad_(False)

    def encode(self, images: Tensor) -> list[Tensor]:
        """Features as `FusionUNet` has them, halved from maps that are twice as fine from stride 4 on."""
        with torch.no_grad():
            dates = [self._encode_one(image.contiguous()) for image in images.chunk(2)]
        return [torch.cat(features) for features in zip(*dates, strict=True)]

    def _encode_one(self, image: Tensor) -> list[Tensor]:
        layers = [layer for stage in self.stages.values() for layer in stage if not isinstance(layer, nn.MaxPool2d)]
        features = [nn.Sequential(*layers[:3])(image)]
        for layer in layers[3:]:
            features.append(layer(features[-1]))
        return [features[0], *(F.max_pool2d(feature, 2) for feature in features[1:])]


class Table:
    """Rows as they come, for people on the screen and for machines in a file."""

    def __init__(self, device: torch.device, quick: bool):
        self.device, self.repeats = device, 3 if quick else 5
        self.rows: list[dict[str, object]] = []

    def add(self, name: str, value: float, unit: str, low: float | None = None, high: float | None = None) -> float:
        """Print a row and keep it."""
        self.rows.append({"row": name, "value": value, "unit": unit, "low": low, "high": high})
        spread = "" if low is None else f"  ({low:.4g} to {high:.4g})"
        print(f"  {name:<52} {value:>10.4g} {unit}{spread}", flush=True)
        return value

    def seconds(self, name: str, work: Callable[[], object], repeats: int | None = None) -> float:
        """A row of the median seconds of a call, the device's work included."""
        times = [self._once(work) for _ in range((repeats or self.repeats) + 1)][1:]
        return self.add(name, statistics.median(times), "s", min(times), max(times))

    def _once(self, work: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Waited:
    """A loader that tells how long it was waited for."""

    def __init__(self, loader: DataLoader):
        self.loader, self.dataset, self.batch_sampler, self.seconds = loader, loader.dataset, loader.batch_sampler, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch


def heading(text: str) -> None:
    """A line above some rows."""
    print(f"\n{text}", flush=True)


def noise(pairs: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A batch without content."""
    image_a, image_b = torch.randint(0, 256, (2, pairs, 3, size, size), dtype=torch.uint8, device=device)
    return image_a, image_b, (torch.rand(pairs, 1, size, size, device=device) < 0.05).byte()


def write_noise(folder: Path, pairs: int, size: int, drawn: int = 4) -> None:
    """A split train of noise, the first few pairs over and over again; val is the same."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    (folder / "val").symlink_to("train")  # else a tenth of train would be val
    for part in ("A", "B", "label"):
        (folder / "train" / part).mkdir(parents=True)
        for index in tqdm(range(pairs), f"writing {part}", leave=False, disable=None):
            file = folder / "train" / part / f"{index}.png"
            if index >= drawn:
                file.write_bytes(file.with_name(f"{index % drawn}.png").read_bytes())
                continue
            array = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            if part == "label":  # blocks: in masks of noise each pixel would be an object
                array = (array[::32, ::32, 0] // 128 * 255).repeat(32, 0).repeat(32, 1)[:size, :size]
            Image.fromarray(array).save(file)


class Trainer:
    """A model with what a training step needs, as `main.train` sets it up."""

    def __init__(self, model: FusionUNet, device: torch.device, amp: bool, compiled: bool = False):
        self.model = model.to(device).train()
        self.trained = torch.compile(self.model) if compiled else self.model
        self.model.amp = amp
        self.autocast = self.model.autocast()
        self.precision = str(fast_dtype(device) if amp else torch.float32).removeprefix("torch.")
        self.optimizers = make_optimizers(self.model, main.LEARNING_RATE, main.WEIGHT_DECAY)
        self.criterion, self.metrics = CombinedIoULoss(), ChangeMetrics()

    def forward(self, image_a: Tensor, image_b: Tensor, label: Tensor) -> Tensor:
        """The loss of a batch."""
        with self.autocast:
            logits = self.trained(image_a, image_b)
        self.metrics.update(logits.detach(), label)
        return self.criterion(logits, label)

    def step(self, image_a: Tensor, image_b: Tensor, label: Tensor) -> None:
        """All that a training step does once its batch is on the device."""
        loss = self.forward(*color_jitter(torch.cat([image_a, image_b]), *JITTER).chunk(2), label)
        self.model.zero_grad()
        loss.backward()
        self.update()

    def clip(self) -> None:
        """Shorten the gradient."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def update(self) -> None:
        """What follows the gradients."""
        self.clip()
        for optimizer in self.optimizers:
            optimizer.step()

    def encode(self, image_a: Tensor, image_b: Tensor) -> list[Tensor]:
        """The backbone alone."""
        with self.autocast, torch.no_grad():
            return self.model.encode(self.model.prepare(image_a, image_b))


class Operators(TorchDispatchMode):
    """Counts the operators that compute something, each about a kernel of a GPU; views and empty tensors aren't."""

    NONE = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "profiler::")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, operator: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.count += not (operator.is_view or operator.name().startswith(self.NONE))
        return operator(*args, **kwargs or {})


def operators(work: Callable[[], object]) -> int:
    """How many a call launches."""
    with Operators() as counted:
        work()
    return counted.count


def launches(trainer: Trainer, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, int]:
    """Operators of a training step, by part; "the step" is all of them."""
    *images, label = batch
    trainer.step(*batch)  # there are gradients from here on
    logits = trainer.trained(*images).detach()
    whole = operators(lambda: trainer.step(*batch))
    parts = {
        "colour jitter": operators(lambda: color_jitter(torch.cat(images), *JITTER)),
        "backbone": operators(lambda: trainer.encode(*images)),
        "fusion and decoder, forward": 0,
        "loss": operators(lambda: trainer.criterion(logits, label)),
        "metrics": operators(lambda: trainer.metrics.update(logits, label)),
        "backward": 0,
        "gradient norm": operators(trainer.clip),
        "Muon": operators(trainer.optimizers[0].step),
        "AdamW": operators(trainer.optimizers[1].step),
    }
    forward = operators(lambda: trainer.forward(*batch))
    parts["fusion and decoder, forward"] = forward - sum(parts[name] for name in ("backbone", "loss", "metrics"))
    parts["backward"] = whole - sum(parts.values())
    return parts | {"the step": whole}


def limits(table: Table, size: int) -> float:
    """The machine's two limits; returns the matrix rate, FLOP a second, in the precision of training."""
    heading("the machine's limits")
    a, rates = torch.randn(size, size, device=table.device), []
    for dtype in dict.fromkeys((torch.float32, fast_dtype(table.device))):
        b = a.to(dtype)
        seconds = table.seconds(f"{size} × {size} matrix product, {str(dtype)[6:]}", lambda b=b: b @ b)
        rates.append(table.add("its rate", 2 * size**3 / seconds / 1e12, "TFLOP/s"))
    source = torch.empty(2**28 if table.device.type == "cuda" else 2**26, device=table.device).zero_()
    target = torch.empty_like(source)
    seconds = table.seconds(f"copying {source.nbytes / 2**30:.2f} GiB", lambda: target.copy_(source))
    table.add("memory bandwidth (read and written)", 2 * source.nbytes / seconds / 1e9, "GB/s")
    return rates[-1] * 1e12


def steps(table: Table, trainer: Trainer, pairs: int, size: int, rate: float) -> float:
    """A training step and its parts; returns its seconds."""
    heading(f"a training step on {pairs} pairs of {size} × {size}, {trainer.precision}")
    batch = noise(pairs, size, table.device)
    with FlopCounterMode(display=False) as counter:
        trainer.forward(*batch).backward()
    if table.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    backbone = table.seconds("backbone, forward", lambda: trainer.encode(*batch[:2]))
    forward = table.seconds("model and loss, forward", lambda: trainer.forward(*batch))
    table.add("so fusion, decoder and loss, forward", forward - backbone, "s")
    both = table.seconds("model and loss, forward and backward", lambda: trainer.forward(*batch).backward())
    table.add("so backward", both - forward, "s")
    table.seconds("gradient norm, Muon and AdamW", trainer.update)
    table.seconds("colour jitter, both dates", lambda: color_jitter(torch.cat(batch[:2]), *JITTER))
    step = table.seconds("the step", lambda: trainer.step(*batch))
    table.add("pairs a second", pairs / step, "pairs/s")
    table.add("floating-point operations, by torch's counter", counter.get_total_flops() / 1e9, "GFLOP")
    table.add("share of the matrix rate", 100 * counter.get_total_flops() / step / rate, "%")
    if table.device.type == "cuda":
        table.add("peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
        table.add("an epoch of LEVIR-CD, at this rate", LEVIR_CROPS * step / pairs * (256 / size) ** 2, "s")
    return step


def loading(table: Table, folder: Path, pairs: int) -> None:
    """Loaders of random crops, from the files and from the cache, with one process and with several."""
    heading("the loader alone, random crops of 256 × 256 from images of 1024 × 1024")
    for kind, cache in (("decoding each time", None), ("from the cache", folder / "cache")):
        data = LEVIRCD(folder, "train", 256, augment=True, cache_dir=cache)
        for workers in [0] + [2**power for power in range(6) if 2**power <= os.cpu_count()]:
            loader = make_loader(data, RandomBatches(len(data), pairs), workers, table.device.type == "cuda")
            start, end, items = None, 0.0, 0
            while start is None or end - start < 3:
                for *_, label in loader:
                    end = time.perf_counter()
                    items += len(label) if start else 0
                    start = start or end  # the workers are up
            name = f"{kind}, {workers or 'no'} worker{'s' * (workers != 1)}"
            table.add(name, items / (end - start), "pairs/s")


def looping(table: Table, trainer: Trainer, folder: Path, pairs: int) -> None:
    """The real loop, and what it loses against the bare step."""
    data = LEVIRCD(folder, "train", 256, augment=True, cache_dir=folder / "cache")
    loader = Waited(make_loader(data, RandomBatches(len(data), pairs), None, table.device.type == "cuda"))
    heading(f"the real loop, {loader.loader.num_workers or 'no'} workers")
    constants = {name: getattr(main, name) for name in main.ALLOWED} | {"EPOCHS": 1}
    shares, rates = [], []
    for _ in range(2):
        loader.seconds, start = 0.0, time.perf_counter()
        # Once the steps are done, with no statistics of BatchNorm taken anew, it is over.
        over = patch.multiple(main, SETTLED_AFTER=0, evaluate=lambda *_: 1 / 0, load=lambda *_: loader)
        with over, contextlib.suppress(ZeroDivisionError):
            main.train(trainer.model, {"train": data, "val": data}, SimpleNamespace(**constants), None, None)
        seconds = time.perf_counter() - start
        rates.append(len(loader) * pairs / seconds)
        shares.append(100 * loader.seconds / seconds)
    rate = table.add("pairs a second", statistics.median(rates), "pairs/s", min(rates), max(rates))
    table.add("waited for the loader", statistics.median(shares), "% of the time", min(shares), max(shares))
    batch = noise(pairs, 256, table.device)
    again = table.seconds("bare steps beside it", lambda: trainer.step(*batch))
    table.add("slower than these", 100 * (1 - rate * again / pairs), "%")


def inference(table: Table, model: FusionUNet, large: tuple[int, int]) -> None:
    """Whole images, as `predict` takes them."""
    heading(f"prediction, {str(fast_dtype(table.device))[6:]}")
    image_a, image_b, _ = noise(1, 1024, table.device)

    def encode() -> None:
        with torch.inference_mode(), model.autocast():
            model.encode(model.prepare(image_a, image_b))

    backbone = table.seconds("1024 × 1024, backbone", encode, 3)
    whole = table.seconds("1024 × 1024, predict", lambda: model.predict(image_a[0], image_b[0]), 3)
    table.add("so outside the backbone", 100 * (1 - backbone / whole), "%")
    table.add("pixels a second", 1024**2 / whole / 1e6, "million/s")
    raster = torch.randint(0, 256, (2, 3, *large), dtype=torch.uint8)
    start = time.perf_counter()
    model.predict(*raster)
    name = f"{large[1]} × {large[0]}, predict, in tiles"
    table.add(
        "pixels a second of it",
        large[0] * large[1] / table.add(name, time.perf_counter() - start, "s") / 1e6,
        "million/s",
    )


def ending(table: Table, trainer: Trainer, folder: Path) -> None:
    """What an epoch's end costs beside validation: the checkpoints, and the picture that few epochs have."""
    heading("an epoch's end, ResNet-50 frozen")
    states = {"optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers], "rows": []}
    table.seconds("last.pt, each epoch", lambda: save(
        trainer.model.checkpoint(whole=False) | states, folder / "last.pt"))  # fmt: skip
    table.seconds("best.pt, when it got better", lambda: save(trainer.model.checkpoint(), folder / "best.pt"))
    data = LEVIRCD(folder, "train", 256, cache_dir=folder / "cache")
    picture = folder / "picture.png"
    table.seconds("the picture", lambda: plot_predictions(
        trainer.model, data, table.device, num_samples=4, path=picture), 2)  # fmt: skip
    table.add("last.pt", (folder / "last.pt").stat().st_size / 1e6, "MB")


def starting(table: Table, folder: Path) -> None:
    """From the command to the first step."""
    heading("start-up")
    write_noise(folder / "small", 2, 128)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    command = [sys.executable, "-c", FIRST_STEP, str(time.time()), str(folder / "small"), table.device.type]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if run.returncode == 0:
        seconds = float(run.stdout.partition("FIRST STEP")[2].split()[0])
        table.add("python main.py to the end of the first step", seconds, "s")
    else:  # MLflow isn't there, say
        print(f"  python main.py: {run.stderr.splitlines()[-1]}")


def listing(table: Table, folder: Path, pairs: int) -> None:
    """A large data set of tiny files: listed; a smaller one: checked, decoded, and at the next start."""
    heading("large data sets")
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_noise(folder / "many", pairs, 8)
    start = time.perf_counter()
    find_pairs(*(folder / "many" / "train" / part for part in ("A", "B", "label")))
    table.add(f"{pairs:,} pairs, listed and paired", time.perf_counter() - start, "s")
    write_noise(folder / "fewer", pairs // 20, 8)
    for which in ("checked and decoded too", "at the next start"):
        start = time.perf_counter()
        LEVIRCD(folder / "fewer", "train", None, True, folder / "fewer" / "cache")
        table.add(f"{pairs // 20:,} pairs, {which}", time.perf_counter() - start, "s")
    table.add("peak memory grown meanwhile", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss) / 2**10, "MiB")


def plain(table: Table, name: str, pairs: int, repeats: int = 2) -> float:
    """The plain version's step, in seconds."""
    trainer = Trainer(PlainUNet(), table.device, amp=False)
    batch = noise(pairs, 256, table.device)
    return table.seconds(name, lambda: trainer.step(*batch), repeats)


def profile(trainer: Trainer, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """What a step's time goes to."""
    heading("what the step's time goes to")
    kind = "cuda" if batch[0].is_cuda else "cpu"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (kind == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            trainer.step(*batch)
    spent = {event.key: getattr(event, f"self_{'device' if kind == 'cuda' else 'cpu'}_time_total")
             for event in profiler.key_averages()}  # fmt: skip
    for name in sorted(spent, key=spent.get, reverse=True)[:8]:
        print(f"  {name[:52]:<52} {100 * spent[name] / sum(spent.values()):>10.1f} %")


def benchmark(kind: str, quick: bool) -> None:
    """All of it."""
    on_gpu, device = kind == "cuda", torch.device(kind)
    pairs, table = 64 if on_gpu else 4, Table(device, quick)
    name = torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU"
    machine = f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    print(machine, flush=True)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    heading("the plain version: two passes, NCHW, float32, no max-pool, each sample decoded")
    plain_step = plain(table, "its step", pairs)
    pick_device(kind)  # on a CPU it has freed memory kept from here on, as a run has
    if not (on_gpu or quick):
        plain(table, "its step, freed memory kept", pairs, 1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        starting(table, folder)
        write_noise(folder, 128 if on_gpu else 4, 1024)
        data = LEVIRCD(folder, "train", 256, augment=True)
        decoding = table.seconds("decoding its batch", lambda: [data[index] for index in range(pairs)], 2)
        model = FusionUNet(weights=None).to(device, memory_format=torch.channels_last)
        inference(table, model, (8192, 8192) if on_gpu else (1024, 2048))
        rate = limits(table, 8192 if on_gpu else 2048)
        trainer = Trainer(model, device, amp=True)
        step = steps(table, trainer, pairs, 256, rate)
        table.add("the plain version's step takes", plain_step / step, "times as long")
        table.add("with its decoding", (plain_step + decoding) / step, "times as long")
        heading("operators that a step launches")
        for name, count in launches(trainer, noise(2, 64, device)).items():
            table.add(name, count, "operators")
        profile(trainer, noise(pairs, 256, device))
        loading(table, folder, pairs)
        looping(table, trainer, folder, pairs)
        ending(table, trainer, folder)
        if on_gpu:
            steps(table, trainer, pairs // 4, 512, rate)
            steps(table, trainer, pairs // 16, 1024, rate)
            compiled, batch = Trainer(model, device, amp=True, compiled=True), noise(pairs, 256, device)
            heading("with COMPILE=True")
            table.seconds("a step", lambda: compiled.step(*batch))
        listing(table, folder, 10_000 if quick else 100_000)
    path = Path("runs", f"benchmark_{kind}.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "quick": quick, "rows": table.rows}, indent=2) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    kinds = [argument for argument in sys.argv[1:] if argument != "--quick"]
    if len(kinds) > 1 or not set(kinds) <= {"cpu", "cuda"}:
        sys.exit("error: give cpu or cuda, and --quick to have it sooner")
    kind = kinds[0] if kinds else "cuda" if torch.cuda.is_available() else "cpu"
    benchmark(kind, "--quick" in sys.argv)
