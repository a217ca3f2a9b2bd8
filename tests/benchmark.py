"""How fast it is here, beside the same network written the plain way: a table, and a JSON file in runs/.

    python tests/benchmark.py [cpu|cuda] [--quick]

Medians, and the range, of several calls after a warm-up. Nothing is scored: weights and images are noise.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))
if importlib.util.find_spec("mlflow") is None:  # speed can be measured without
    sys.modules |= dict.fromkeys(("mlflow", "mlflow.entities", "mlflow.tracking.context.registry"), MagicMock())
import main
from dataset import LEVIRCD, RandomBatches, make_loader
from losses import CombinedIoULoss
from metrics import ChangeMetrics
from model import FusionUNet, autocast, fast_dtype, save_checkpoint
from visualize import plot_predictions

ROOT = Path(__file__).parent.parent
FIRST_STEP = """
import sys, time
from torch.optim import optimizer
def stop(*_):
    print("FIRST STEP", time.time() - float(sys.argv[1]))
    raise SystemExit
optimizer.register_optimizer_step_post_hook(stop)
import main
main.main(DATA_DIR=sys.argv[2], CACHE_DIR=None, WEIGHTS=None, BATCH_SIZE=1, DEVICE=sys.argv[3])
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

    def heading(self, text: str) -> None:
        """A line above some rows."""
        print(f"\n{text}", flush=True)

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
        start = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def noise(pairs: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A batch without content."""
    image_a, image_b = torch.randint(0, 256, (2, pairs, 3, size, size), dtype=torch.uint8, device=device)
    return image_a, image_b, (torch.rand(pairs, 1, size, size, device=device) < 0.05).byte()


def write_noise(folder: Path, pairs: int, size: int) -> None:
    """A split train of noise; val is the same."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    (folder / "val").symlink_to("train")  # else a tenth of train would be val
    for part in ("A", "B", "label"):
        (folder / "train" / part).mkdir(parents=True)
        for index in range(pairs):
            array = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            if part == "label":  # blocks, as in a real mask
                array = (array[::32, ::32, 0] // 128 * 255).repeat(32, 0).repeat(32, 1)[:size, :size]
            Image.fromarray(array).save(folder / "train" / part / f"{index}.png")


class Trainer:
    """A training step as in `main.train_one_epoch`, and its parts."""

    def __init__(self, model: FusionUNet, device: torch.device, amp: bool, compiled: bool = False):
        constants = {name: getattr(main, name) for name in main.TYPES} | {"AMP": amp, "COMPILE": compiled}
        self.config = SimpleNamespace(**constants)
        self.model = model.to(device).train()
        self.state, _ = main.make_state(self.model, self.config, steps_per_epoch=1)
        self.criterion, self.metrics = CombinedIoULoss(), ChangeMetrics()
        self.autocast = autocast(device, amp)
        self.precision = str(fast_dtype(device) if amp else torch.float32).removeprefix("torch.")

    def jitter(self, image_a: Tensor, image_b: Tensor) -> list[Tensor]:
        """Both dates with colour jitter."""
        return main.jitter(image_a, image_b, self.config)

    def forward(self, image_a: Tensor, image_b: Tensor, label: Tensor) -> Tensor:
        """The loss of a batch."""
        with self.autocast:
            logits = self.state.parallel(image_a, image_b)
        self.metrics.update(logits, label)
        return self.criterion(logits, label)

    def step(self, image_a: Tensor, image_b: Tensor, label: Tensor) -> None:
        """All that a training step does once its batch is on the device."""
        loss = self.forward(*self.jitter(image_a, image_b), label)
        self.model.zero_grad()
        loss.backward()
        self.update()

    def clip(self) -> None:
        """Clip the gradient."""
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.CLIP_NORM)

    def update(self) -> None:
        """Clip the gradient and step both optimizers."""
        self.clip()
        for optimizer in self.state.optimizers:
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

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
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
    logits = trainer.state.parallel(*images).detach()
    step, forward = operators(lambda: trainer.step(*batch)), operators(lambda: trainer.forward(*batch))
    parts = {
        "colour jitter": operators(lambda: trainer.jitter(*images)),
        "backbone": operators(lambda: trainer.encode(*images)),
        "loss": operators(lambda: trainer.criterion(logits, label)),
        "metrics": operators(lambda: trainer.metrics.update(logits, label)),
        "gradient norm": operators(trainer.clip),
        "Muon": operators(trainer.state.optimizers[0].step),
        "AdamW": operators(trainer.state.optimizers[1].step),
    }
    parts["fusion and decoder, forward"] = forward - sum(parts[name] for name in ("backbone", "loss", "metrics"))
    parts["backward"] = step - sum(parts.values())
    return parts | {"the step": step}


def steps(table: Table, trainer: Trainer, pairs: int, size: int) -> float:
    """A training step and its parts; returns its seconds."""
    table.heading(f"a training step on {pairs} pairs of {size} × {size}, {trainer.precision}")
    batch = noise(pairs, size, table.device)
    if table.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    backbone = table.seconds("backbone, forward", lambda: trainer.encode(*batch[:2]))
    forward = table.seconds("model and loss, forward", lambda: trainer.forward(*batch))
    table.add("so fusion, decoder and loss, forward", forward - backbone, "s")
    both = table.seconds("model and loss, forward and backward", lambda: trainer.forward(*batch).backward())
    table.add("so backward", both - forward, "s")
    table.seconds("gradient norm, Muon and AdamW", trainer.update)
    table.seconds("colour jitter, both dates", lambda: trainer.jitter(*batch[:2]))
    step = table.seconds("the step", lambda: trainer.step(*batch))
    table.add("pairs a second", pairs / step, "pairs/s")
    if table.device.type == "cuda":
        table.add("peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    return step


def loading(table: Table, folder: Path, pairs: int) -> None:
    """Loaders of random crops, from the files and from the cache, with one process and with several."""
    table.heading("the loader alone, random crops of 256 × 256 from images of 1024 × 1024")
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
    loader = make_loader(data, RandomBatches(len(data), pairs), None, table.device.type == "cuda")
    table.heading(f"the real loop, {loader.num_workers or 'no'} workers")

    def train() -> None:
        main.train_one_epoch(trainer.state, loader, trainer.criterion, trainer.config, 1, None)

    rate = len(loader) * pairs / table.seconds(f"an epoch of {len(loader)} steps", train, 2)
    table.add("pairs a second", rate, "pairs/s")
    batch = noise(pairs, 256, table.device)
    step = table.seconds("bare steps beside it", lambda: trainer.step(*batch))
    table.add("slower than these", 100 * (1 - rate * step / pairs), "%")


def inference(table: Table, model: FusionUNet, large: tuple[int, int]) -> None:
    """Whole images, as `predict` takes them."""
    table.heading(f"prediction, {str(fast_dtype(table.device))[6:]}")
    image_a, image_b, _ = noise(1, 1024, table.device)

    def encode() -> None:
        with torch.inference_mode(), autocast(table.device, amp=True):
            model.encode(model.prepare(image_a, image_b))

    backbone = table.seconds("1024 × 1024, backbone", encode, 3)
    whole = table.seconds("1024 × 1024, predict", lambda: model.predict(image_a[0], image_b[0]), 3)
    table.add("so outside the backbone", 100 * (1 - backbone / whole), "%")
    raster = torch.randint(0, 256, (2, 3, *large), dtype=torch.uint8)
    seconds = table.seconds(f"{large[1]} × {large[0]}, predict, in tiles", lambda: model.predict(*raster), 1)
    table.add("pixels a second of it", large[0] * large[1] / seconds / 1e6, "million/s")


def ending(table: Table, trainer: Trainer, folder: Path) -> None:
    """What an epoch's end costs beside validation: the checkpoints, and the picture that few epochs have."""
    table.heading("an epoch's end, ResNet-50 frozen")
    model, data = trainer.model, LEVIRCD(folder, "train", 256, cache_dir=folder / "cache")

    def save_last() -> None:
        states = [optimizer.state_dict() for optimizer in trainer.state.optimizers]
        save_checkpoint({"model": model.trained_state(), "optimizers": states}, folder / "last.pt")

    def draw() -> None:
        plot_predictions(model, data, table.device, num_samples=2, path=folder / "picture.png")

    table.seconds("last.pt, each epoch", save_last)
    table.seconds(
        "best.pt, after the best epoch so far", lambda: save_checkpoint(model.checkpoint(), folder / "best.pt")
    )
    table.seconds("the picture", draw, 2)
    table.add("last.pt", (folder / "last.pt").stat().st_size / 1e6, "MB")


def starting(table: Table, folder: Path) -> None:
    """From the command to the first step."""
    table.heading("start-up")
    write_noise(folder / "small", 2, 128)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    command = [sys.executable, "-c", FIRST_STEP, str(time.time()), str(folder / "small"), table.device.type]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if run.returncode == 0:
        seconds = float(run.stdout.partition("FIRST STEP")[2].split()[0])
        table.add("python main.py to the end of the first step", seconds, "s")
    else:  # such as where there is no MLflow
        print(f"  python main.py: {run.stderr.splitlines()[-1]}")


def benchmark(kind: str, quick: bool) -> None:
    """All of it."""
    on_gpu, device = kind == "cuda", torch.device(kind)
    pairs, table = 64 if on_gpu else 4, Table(device, quick)
    name = torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU"
    machine = f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    print(machine, flush=True)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    batch = noise(pairs, 256, device)
    table.heading("the plain version: two passes, NCHW, float32, no max-pool, each sample decoded")
    plain = Trainer(PlainUNet(), device, amp=False)
    plain_step = table.seconds("its step", lambda: plain.step(*batch), 2)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        starting(table, folder)
        write_noise(folder, 128 if on_gpu else 4, 1024)
        data = LEVIRCD(folder, "train", 256, augment=True)
        decoding = table.seconds("decoding the plain version's batch", lambda: [data[i] for i in range(pairs)], 2)
        model = FusionUNet(weights=None).to(device, memory_format=torch.channels_last)
        inference(table, model, (8192, 8192) if on_gpu else (1024, 2048))
        trainer = Trainer(model, device, amp=True)
        step = steps(table, trainer, pairs, 256)
        table.add("the plain version's step takes", plain_step / step, "times as long")
        table.add("with its decoding", (plain_step + decoding) / step, "times as long")
        table.heading("operators that a step launches")
        for name, count in launches(trainer, noise(2, 64, device)).items():
            table.add(name, count, "operators")
        loading(table, folder, pairs)
        looping(table, trainer, folder, pairs)
        ending(table, trainer, folder)
        if on_gpu:
            steps(table, trainer, pairs // 16, 1024)
            compiled = Trainer(model, device, amp=True, compiled=True)
            table.seconds("a step with COMPILE=True", lambda: compiled.step(*batch))
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
