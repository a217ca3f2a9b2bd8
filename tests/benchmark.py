"""How fast it is here: `python tests/benchmark.py [cpu|cuda]`. Medians over repeats, after a warm-up."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from dataset import LEVIRCD, RandomBatches, color_jitter
from losses import CombinedIoULoss
from model import FusionUNet

SIZE = 256  # pixels, a side of a crop


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """Median time of a call, in seconds, the device's work included."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def random_batch(pairs: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    image_a, image_b = torch.randint(0, 256, (2, pairs, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    return image_a, image_b, (torch.rand(pairs, 1, SIZE, SIZE, device=device) < 0.05).byte()


def main(device: torch.device, pairs: int) -> None:
    """Print a table: seconds and pairs a second of the training step, its parts, and the loader."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = FusionUNet(weights=None).to(device, memory_format=torch.channels_last).train()
    criterion = CombinedIoULoss()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    image_a, image_b, label = random_batch(pairs, device)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def encode() -> None:
        with autocast(), torch.no_grad():
            model.encode(image_a, image_b)

    def predict() -> None:
        with autocast(), torch.no_grad():
            model(image_a, image_b)

    def step() -> None:
        with autocast():
            logits = model(color_jitter(image_a, 0.1, 0.1, 0.1, 0.01), color_jitter(image_b, 0.1, 0.1, 0.1, 0.01))
        optimizer.zero_grad()
        criterion(logits, label).backward()
        optimizer.step()

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; {pairs} pairs of {SIZE} × {SIZE}; medians")
    large_a, large_b = torch.randint(0, 256, (2, 3, 1024, 1024), dtype=torch.uint8, device=device)

    def encode_large() -> None:
        with torch.inference_mode():
            model.encode(large_a[None], large_b[None])

    rows = {"backbone, forward": encode, "model, forward": predict, "training step": step}
    rows["colour jitter, one date"] = lambda: color_jitter(image_a, 0.1, 0.1, 0.1, 0.01)
    # First, as in a process that only predicts: training leaves memory in pieces, which slows large images.
    whole = {"1024 × 1024, backbone": encode_large, "1024 × 1024, predict": lambda: model.predict(large_a, large_b)}
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for part in ("A", "B", "label"):
            Path(folder, "train", part).mkdir(parents=True)
            noise = rng.integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
            Image.fromarray(noise if part != "label" else noise[..., 0] // 128 * 255).save(
                Path(folder, "train", part, "x.png")
            )
        for kind, cache in (("decoding", None), ("from the cache", Path(folder, "cache"))):
            data = LEVIRCD(folder, "train", SIZE, augment=True, cache_dir=cache)
            keys = next(iter(RandomBatches(len(data), 1))) * pairs
            rows[f"loading, {kind}"] = lambda data=data, keys=keys: [data[key] for key in keys]
        for row, work in tqdm((whole | rows).items(), unit="row", leave=False, disable=None):
            took = seconds(work, device)
            rate = (1 if row in whole else pairs) / took
            print(f"{row:26} {took:8.4f} s {rate:10.1f} pairs/s", flush=True)


if __name__ == "__main__":
    kind = sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu"
    main(torch.device(kind), 32 if kind == "cuda" else 4)
