"""What a machine can tell about this program: checks, speed and a real run, as a table and a JSON file in runs/.

python tests/benchmark.py [cpu|cuda] [--quick] [--data FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
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
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
if importlib.util.find_spec("mlflow") is None:  # all this works without
    sys.modules["mlflow"] = MagicMock()
import main
from data.make_demo import make_demo
from dataset import LEVIRCD, RandomBatches, make_loader
from losses import CombinedIoULoss
from metrics import ChangeMetrics
from model import FusionUNet, autocast, fast_dtype, save_checkpoint

ROOT = Path(__file__).parent.parent
WITH_LITTLE_MEMORY = """
import runpy, sys, torch
del sys.argv[0]
torch.cuda.set_per_process_memory_fraction(3e8 / torch.cuda.mem_get_info()[1])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Table:
    """Rows as they come, for people on the screen and for machines in a file."""

    def __init__(self, device: torch.device, quick: bool):
        self.device, self.quick, self.rows = device, quick, []

    def add(self, name: str, value: float | str, unit: str = "", low: float | None = None, high: float | None = None):
        """Print a row and keep it."""
        self.rows.append({"row": name, "value": value, "unit": unit, "low": low, "high": high})
        spread = "" if low is None else f"  ({low:.4g} to {high:.4g})"
        print(f"  {name:<56} {value if isinstance(value, str) else f'{value:.4g}':>9} {unit}{spread}", flush=True)

    def seconds(self, name: str, work: Callable[[], object], repeats: int | None = None) -> float:
        """A row of the median seconds of a call, the device's work included."""
        times = [call_seconds(self.device, work) for _ in range((repeats or (2 if self.quick else 5)) + 1)][1:]
        self.add(name, statistics.median(times), "s", min(times), max(times))
        return statistics.median(times)

    def check(self, name: str, work: Callable[[], tuple[bool, str]], hindrance: str = "") -> None:
        """A row that says whether a check passed, and what it saw; or what keeps it from being made."""
        if hindrance:
            return self.add(name, "–", hindrance)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                passed, seen = work()
        except Exception as error:  # one check doesn't end the others
            passed, seen = False, reason(error)
        self.add(name, "pass" if passed else "FAIL", seen)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"


def call_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """The seconds that a call takes, the device's work included."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Trainer:
    """A training step as in `main.train_one_epoch`, and its parts."""

    def __init__(self, model: FusionUNet, device: torch.device, amp: bool, compile_mode: str | None = None):
        constants = {name: getattr(main, name) for name in main.TYPES} | {"AMP": amp, "COMPILE": False}
        self.config = SimpleNamespace(**constants)
        self.model = model.to(device).train()
        self.state, _ = main.make_state(self.model, self.config, steps_per_epoch=100)
        if compile_mode:
            self.state.parallel = torch.compile(self.model, mode=compile_mode)
        self.criterion, self.metrics = CombinedIoULoss(), ChangeMetrics()
        self.autocast = autocast(device, amp)

    def forward(self, image_a: Tensor, image_b: Tensor, label: Tensor) -> Tensor:
        """The loss of a batch."""
        with self.autocast:
            logits = self.state.parallel(image_a, image_b)
        self.metrics.update(logits, label)
        return self.criterion(logits, label)

    def step(self, image_a: Tensor, image_b: Tensor, label: Tensor) -> Tensor:
        """All that a training step does once its batch is on the device; returns the loss."""
        loss = self.forward(*main.jitter(image_a, image_b, self.config), label)
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.CLIP_NORM)
        for optimizer in self.state.optimizers:
            optimizer.step()
        return loss.detach()


def noise(pairs: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A batch without content."""
    image_a, image_b = torch.randint(0, 256, (2, pairs, 3, size, size), dtype=torch.uint8, device=device)
    return image_a, image_b, (torch.rand(pairs, 1, size, size, device=device) < 0.05).byte()


def write_noise(folder: Path, pairs: int) -> None:
    """A split of noise, 1024 × 1024."""
    rng = np.random.default_rng(0)
    for part in ("A", "B", "label"):
        (folder / part).mkdir(parents=True)
        for index in range(pairs):
            array = rng.integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
            array = array if part != "label" else array[..., 0] // 128 * 255
            Image.fromarray(array).save(folder / part / f"{index}.png")


def new_model(device: torch.device) -> FusionUNet:
    """An untrained model, the same at each call."""
    torch.manual_seed(0)
    return FusionUNet(weights=None).to(device, memory_format=torch.channels_last)


def gradients(device: torch.device, amp: bool, largest: float) -> tuple[bool, str]:
    """The gradients of a step against those on the CPU in float32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    batch, found = noise(4, 128, torch.device("cpu")), []
    for where, in_amp in ((torch.device("cpu"), False), (device, amp)):
        trainer = Trainer(new_model(where), where, in_amp)
        trainer.forward(*(tensor.to(where) for tensor in batch)).backward()
        values = [value.grad.flatten() for value in trainer.model.parameters() if value.requires_grad]
        found.append(torch.cat(values).double().cpu())
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    error = ((found[1] - found[0]).norm() / found[0].norm()).item()
    return error <= largest, f"relative difference {error:.1e}, {largest:g} allowed"


def no_host_wait(device: torch.device) -> tuple[bool, str]:
    """Twenty steps with an error for each synchronisation."""
    trainer, batch = Trainer(new_model(device), device, amp=True), noise(4, 128, device)
    trainer.step(*batch)
    torch.cuda.set_sync_debug_mode("error")
    with contextlib.ExitStack() as stack:
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        for _ in range(20):
            trainer.step(*batch)
    return True, "20 steps"


def same_losses(device: torch.device, compile_mode: str | None, largest: float) -> tuple[bool, str]:
    """The losses of three steps and the weights after them, of two trainings from one seed."""
    losses, weights = [], []
    for mode in (None, compile_mode):
        trainer, batch = Trainer(new_model(device), device, amp=True, compile_mode=mode), noise(4, 128, device)
        losses.append(torch.stack([trainer.step(*batch) for _ in range(3)]))
        weights.append(torch.cat([value.detach().flatten() for value in trainer.model.parameters()]))
    error = ((losses[1] - losses[0]).abs() / losses[0]).max().item()
    return error <= largest and (largest > 0 or torch.equal(*weights)), f"losses differ by {error:.1e}"


def resumed(folder: Path, device: torch.device) -> tuple[bool, str]:
    """A run that is stopped in its second epoch and resumed, against one that wasn't."""
    constants = {
        "DATA_DIR": str(folder / "demo"), "WEIGHTS": None, "BACKBONE": "resnet18", "BATCH_SIZE": 4, "EPOCHS": 2,
        "DEVICE": str(device), "DETERMINISTIC": True, "CACHE_DIR": str(folder / "cache"),
    }  # fmt: skip
    main.main(**constants, RUN_NAME="whole")
    begin = main.seed_epoch

    def stop_in_second(seed: int, epoch: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt
        begin(seed, epoch)

    with patch.object(main, "seed_epoch", stop_in_second), contextlib.suppress(KeyboardInterrupt):
        main.main(**constants, RUN_NAME="stopped")
    main.main(RESUME="runs/stopped", DEVICE=str(device))
    whole, again = (torch.load(f"runs/{name}/last.pt", weights_only=True)["model"] for name in ("whole", "stopped"))
    return all(torch.equal(whole[name], again[name]) for name in whole), f"{len(whole)} tensors"


def tiles(device: torch.device, height: int) -> tuple[bool, str]:
    """Probabilities in tiles of 512 against those in one pass."""
    model, pair = new_model(device), torch.randint(0, 256, (2, 3, height, height - 200), dtype=torch.uint8)
    whole, tiled = (model.predict(*pair, tile_size=size) for size in (2048, 512))
    error = (whole - tiled).abs()
    return error.mean().item() < 1e-3, f"{height} × {height - 200}: mean {error.mean():.1e}, largest {error.max():.1e}"


def out_of_memory(folder: Path) -> tuple[bool, str]:
    """The program where a GPU has 0.3 GB."""
    command = [sys.executable, "-c", WITH_LITTLE_MEMORY, ROOT / "main.py", f"DATA_DIR={folder}/demo", "WEIGHTS=None"]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    last = (run.stderr.strip().splitlines() or ["it ran"])[-1]
    return last.startswith("error: out of memory: lower") and "Traceback" not in run.stderr, last[:100]


def check_all(table: Table, folder: Path) -> None:
    """All checks."""
    print("\nchecks")
    device, quick = table.device, "not with --quick" if table.quick else ""
    no_cuda = "" if device.type == "cuda" else "needs CUDA"
    table.check("gradients in float32, as on the CPU", lambda: gradients(device, False, 1e-3), no_cuda)
    table.check(f"gradients in {str(fast_dtype(device))[6:]}", lambda: gradients(device, True, 0.3))
    table.check("no host wait in a step", lambda: no_host_wait(device), no_cuda)
    torch.use_deterministic_algorithms(True)
    table.check("the same bits twice with DETERMINISTIC", lambda: same_losses(device, None, 0))
    table.check("RESUME to the bit with DETERMINISTIC", lambda: resumed(folder, device))
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = True
    table.check("COMPILE gives the same losses", lambda: same_losses(device, "default", 0.02), quick)
    table.check("prediction in tiles, as in one pass", lambda: tiles(device, 700 if no_cuda else 1500))
    table.check("out of memory ends in one line", lambda: out_of_memory(folder), no_cuda)


# Speed


def matrix_rate(device: torch.device) -> float:
    """Operations a second of a product of two large matrices, in autocast's precision."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=fast_dtype(device))
    return 2 * size**3 / min(call_seconds(device, lambda: a @ b) for _ in range(6))


def steps(table: Table, pairs: int, size: int, compile_mode: str | None = None) -> float:
    """A training step, its share of the matrix rate and its memory; returns pairs a second, 0 where it fails."""
    kind = {None: "eager", "default": "COMPILE", "reduce-overhead": "CUDA graphs"}[compile_mode]
    name, device = f"a step, {pairs} pairs of {size} × {size}, {kind}", table.device
    batch = noise(pairs, size, device)
    try:
        trainer = Trainer(new_model(device), device, amp=True, compile_mode=compile_mode)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = table.seconds(name, lambda: trainer.step(*batch))
    except Exception as error:  # a mode that doesn't work, or too little memory
        table.add(name, "–", reason(error))
        return 0.0
    table.add("  pairs a second", pairs / seconds, "pairs/s")
    if compile_mode is None:
        with FlopCounterMode(display=False) as counter:
            trainer.step(*batch)
        share = counter.get_total_flops() / seconds / matrix_rate(device)
        table.add("  of the rate of a large matrix product", 100 * share, "%")
        if device.type == "cuda":
            table.add("  peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    return pairs / seconds


def loading(table: Table, data: LEVIRCD, pairs: int) -> None:
    """Loaders of random crops, with one process and with several."""
    print("\nthe loader alone, random crops of 256 × 256 from images of 1024 × 1024, from the cache")
    for workers in [0] + [2**power for power in range(5) if 2**power <= os.cpu_count()]:
        loader = make_loader(data, RandomBatches(len(data), pairs), workers, table.device.type == "cuda")
        epochs = [call_seconds(table.device, lambda loader=loader: [None for _ in loader]) for _ in range(4)]
        rate = len(loader) * pairs / min(epochs[1:])  # the first starts the workers
        table.add(f"{workers or 'no'} worker{'s' * (workers != 1)}", rate, "pairs/s")


def waiting(table: Table, data: LEVIRCD, pairs: int) -> None:
    """What the real loop waits for: the loader, the launches or the arithmetic."""
    device = table.device
    loader = make_loader(data, RandomBatches(len(data), pairs), None, device.type == "cuda")
    print(f"\nwhat the loop waits for, {pairs} pairs of 256 × 256, {loader.num_workers or 'no'} workers")
    trainer, loading_time = Trainer(new_model(device), device, amp=True), 0.0

    def epoch() -> None:
        nonlocal loading_time
        batches, loading_time = iter(loader), 0.0
        for _ in range(len(loader)):
            start = time.perf_counter()
            batch = next(batches)
            loading_time += time.perf_counter() - start
            trainer.step(*main.to_device(batch, device))

    wall = table.seconds(f"{len(loader)} steps", epoch, 1)
    table.add("pairs a second", len(loader) * pairs / wall, "pairs/s")
    table.add("the loader", 100 * loading_time / wall, "%")
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            epoch()
            torch.cuda.synchronize()
        busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
        table.add("arithmetic", 100 * busy / wall, "%")
        table.add("launches, the rest", 100 * max(0.0, 1 - (busy + loading_time) / wall), "%")


def ending(table: Table, folder: Path) -> None:
    """What an epoch's end costs beside validation: the checkpoints."""
    print("\nan epoch's end")
    trainer = Trainer(new_model(table.device), table.device, amp=True)
    trainer.step(*noise(2, 64, table.device))
    states = [optimizer.state_dict() for optimizer in trainer.state.optimizers]
    last, best = {"model": trainer.model.trained_state(), "optimizers": states}, trainer.model.checkpoint()
    table.seconds("last.pt, each epoch", lambda: save_checkpoint(last, folder / "last.pt"))
    table.seconds("best.pt, after the best so far", lambda: save_checkpoint(best, folder / "best.pt"))


def speed(table: Table, folder: Path) -> tuple[int, int]:
    """All speeds; returns the pairs and the crop of the fastest step."""
    on_gpu, rates = table.device.type == "cuda", {}
    print(f"\ntraining steps, {str(fast_dtype(table.device))[6:]}")
    sizes = [(16, 128), (64, 128), (16, 256), (64, 256)] if on_gpu else [(4, 256)]
    for pairs, size in sizes:
        rates[pairs, size] = size**2 * steps(table, pairs, size)
        for mode in ("default", "reduce-overhead") if on_gpu else ():
            steps(table, pairs, size, mode)
    pairs = 64 if on_gpu else 4
    write_noise(folder / "noise", 128 if on_gpu else 1)
    data = LEVIRCD(folder, "noise", 256, augment=True, cache_dir=folder / "cache")
    loading(table, data, pairs)
    waiting(table, data, pairs)
    ending(table, folder)
    print("\nprediction")
    model = new_model(table.device)
    for side in (1024,) if table.quick else (1024, 10_000 if on_gpu else 2048):
        pair = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
        table.seconds(f"a pair of {side:,} × {side:,}", lambda pair=pair: model.predict(*pair), 1)
    return max(rates, key=rates.get)


def real_run(table: Table, folder: Path, data: str | None, fastest: tuple[int, int]) -> None:
    """Runs as a user makes them, at the default and at the size of the fastest step."""
    epochs = 1 if table.quick else 20
    print(f"\na run of {data or 'the demo'}, {epochs} epochs, untrained backbone")
    for pairs, size in dict.fromkeys(((main.BATCH_SIZE, main.CROP_SIZE), fastest)):
        rate = main.LEARNING_RATE * (pairs * size**2 / (main.BATCH_SIZE * main.CROP_SIZE**2)) ** 0.5
        constants = {"BATCH_SIZE": pairs, "CROP_SIZE": size, "LEARNING_RATE": rate, "EPOCHS": epochs, "WEIGHTS": None}
        constants |= {"DATA_DIR": data or str(folder / "demo"), "CACHE_DIR": str(folder / "cache")}
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            scores = main.main(**constants, DEVICE=str(table.device), RUN_NAME=f"{pairs}_{size}")
        name = f"{pairs} pairs of {size} × {size}"
        table.add(f"{name}, validation IoU", scores["val_iou"])
        table.add(f"{name}, the whole run", time.perf_counter() - start, "s")


def benchmark(options: argparse.Namespace) -> None:
    """All of it."""
    device, home = torch.device(options.device), Path.cwd()
    table, on_gpu = Table(device, options.quick), device.type == "cuda"
    machine = {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU",
        "driver": subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader") if on_gpu else "",
        "memory": f"{torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB" if on_gpu else "", "cores": os.cpu_count(),
        "python": platform.python_version(), "torch": torch.__version__, "amp": str(fast_dtype(device))[6:],
    }  # fmt: skip
    print(*(f"{name}: {value}" for name, value in machine.items() if value), sep=", ", flush=True)
    torch.set_float32_matmul_precision("high")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for DETERMINISTIC, read when CUDA starts
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # where the runs go
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
            make_demo(Path(folder, "demo"), splits={"train": 4, "val": 2, "test": 2} if options.quick else None)
            check_all(table, Path(folder))
            fastest = speed(table, Path(folder))
            real_run(table, Path(folder), options.data and str(home / options.data), fastest)
    finally:
        os.chdir(home)
        path = Path("runs", f"benchmark_{device.type}.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"machine": machine, "quick": options.quick, "rows": table.rows}, indent=2) + "\n")
        print(f"\n{path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Checks, speed and a real run on this machine.")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("device", nargs="?", choices=("cpu", "cuda"), default=usual)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller calls: two minutes on a CPU")
    parser.add_argument("--data", metavar="FOLDER", help="a data set for the real run (the demo)")
    benchmark(parser.parse_args())
