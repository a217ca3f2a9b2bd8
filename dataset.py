"""LEVIR-CD pairs from files to batches of tensors: decoded once, cropped, augmented."""

from __future__ import annotations

import glob
import hashlib
import os
import signal
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from data.images import DataError, check_headers, find_pairs, read_mask, read_rgb, size_text

FOLDERS = ("A", "B", "label")


class LEVIRCD(Dataset):
    """Pairs of co-registered images and the mask of what changed (LEVIR-CD: Chen and Shi 2020, doi:10.3390/rs12101662).

    An item is `(image_a, image_b, label)`: uint8 (3, H, W), uint8 (3, H, W) and uint8 (1, H, W) in {0, 1}.
    Without augmentation the items are the tiles of each image in reading order (smaller ones at its right and
    bottom edge, so that every pixel is there once), or whole images. With it, an item is a random crop of the
    same image: turned by a quarter, mirrored, and its dates swapped, each at random.

    Args:
        root: folder that holds `split/{A,B,label}/NAME.{png,jpg,tif}`, one stem for the three files of a pair.
        split: "train", "val", "test" or any other folder of `root`.
        crop_size: side of a crop or tile in pixels; None for whole images.
        augment: random crops instead of tiles.
        cache_dir: folder for the decoded pairs, 7 bytes a pixel, filled once and shared by all processes;
            None decodes the files at each access.

    Raises:
        DataError: files are missing, unreadable, of differing sizes, smaller than the crop, or not a mask.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        crop_size: int | None = None,
        augment: bool = False,
        cache_dir: str | os.PathLike | None = None,
    ) -> None:
        self.folder = Path(root) / split
        self.crop_size, self.augment = crop_size, augment
        self.pairs = find_pairs(*(self.folder / name for name in FOLDERS))
        sizes = [check_headers(paths) for paths in self.pairs]
        for paths, size in zip(self.pairs, sizes, strict=True):
            if augment and crop_size and min(size) < crop_size:
                raise DataError(
                    f"{paths[0]}: {size_text(size)} pixels are less than the crop of {crop_size}: lower CROP_SIZE"
                )
            if augment and not crop_size and size != sizes[0]:
                raise DataError(
                    f"{paths[0]}: {size_text(size)} pixels, but {self.pairs[0][0]} has {size_text(sizes[0])}: "
                    "set a CROP_SIZE"
                )

        self.tiles: list[tuple[int, slice, slice]] = []  # pair, rows, columns
        for pair, (height, width) in enumerate(sizes):
            step_y, step_x = crop_size or height, crop_size or width
            for y in range(0, height - step_y + 1 if augment else height, step_y):
                for x in range(0, width - step_x + 1 if augment else width, step_x):
                    self.tiles.append((pair, slice(y, min(y + step_y, height)), slice(x, min(x + step_x, width))))

        self._cached: list[Path] | None = None
        if cache_dir is not None:
            try:
                os.makedirs(cache_dir, exist_ok=True)
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    filled = pool.map(lambda paths: _fill_cache(paths, Path(cache_dir)), self.pairs)
                    bar = {"desc": f"decoding {self.folder}", "unit": "pair", "leave": False, "disable": None}
                    self._cached = list(tqdm(filled, total=len(self.pairs), delay=1, **bar))
            except OSError as error:
                raise DataError(f"CACHE_DIR={cache_dir}: can't be filled ({error}); None does without") from error

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """The item at an index; with augmentation `(index, seed)` gives the same crop each time."""
        index, seed = key if isinstance(key, tuple) else (key, int(torch.randint(2**31, ())))
        pair, rows, columns = self.tiles[index]
        array = self._load(pair)
        array = self._random_crop(array, np.random.default_rng(seed)) if self.augment else array[rows, columns]
        array = np.ascontiguousarray(array.transpose(2, 0, 1))  # (7, H, W): the one copy
        return tuple(torch.from_numpy(array).split([3, 3, 1]))

    def name(self, index: int) -> str:
        """What a person calls item `index`: the stem of its files and, for a tile, its row and column in pixels."""
        pair, rows, columns = self.tiles[index]
        stem = self.pairs[pair][0].stem
        return f"{stem} [{rows.start}, {columns.start}]" if self.crop_size else stem

    def files(self, keys: Iterable[int | tuple[int, int]]) -> str:
        """The images before of some items, as `__getitem__` takes them, in one line."""
        indices = (key[0] if isinstance(key, tuple) else key for key in keys)
        return ", ".join(sorted({str(self.pairs[self.tiles[index][0]][0]) for index in indices}))

    def fingerprint(self) -> str:
        """12 hexadecimal digits that change when a file is added, removed, renamed or changes its size."""
        lines = [f"{path.relative_to(self.folder)} {path.stat().st_size}\n" for paths in self.pairs for path in paths]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]

    def batches(self, batch_size: int) -> list[list[int]]:
        """All indices in lists of at most `batch_size` items of one height and width, for evaluation."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, (_, rows, columns) in enumerate(self.tiles):
            by_size.setdefault((rows.stop - rows.start, columns.stop - columns.start), []).append(index)
        return [same[i : i + batch_size] for same in by_size.values() for i in range(0, len(same), batch_size)]

    def _load(self, pair: int) -> np.ndarray:
        if self._cached is None:
            return _decode(self.pairs[pair])
        try:
            return np.load(self._cached[pair], mmap_mode="r")
        except (OSError, ValueError, EOFError):  # gone or damaged since it was filled
            self._cached[pair].unlink(missing_ok=True)
            return np.load(_fill_cache(self.pairs[pair], self._cached[pair].parent), mmap_mode="r")

    def _random_crop(self, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = array.shape[:2]
        size_y, size_x = self.crop_size or height, self.crop_size or width
        y, x = rng.integers(height - size_y + 1), rng.integers(width - size_x + 1)
        crop = array[y : y + size_y, x : x + size_x]
        # A quarter turn of an oblong whole image would not fit into a batch with the others.
        crop = np.rot90(crop, rng.integers(4) if size_y == size_x else 2 * rng.integers(2))
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        return crop[..., [3, 4, 5, 0, 1, 2, 6]] if rng.random() < 0.5 else crop


class RandomDraws(Sampler):
    """Each index once, in random order, with the seed of its crop; all of it follows from torch's seed."""

    def __init__(self, length: int):
        self.length = length
        self.drawn: list[tuple[int, int]] = []  # in the pass at hand

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order, seeds = torch.randperm(self.length), torch.randint(2**31, (self.length,))
        self.drawn = list(zip(order.tolist(), seeds.tolist(), strict=True))
        return iter(self.drawn)


def make_loader(dataset: LEVIRCD, batch_size: int, num_workers: int | None, on_gpu: bool) -> DataLoader:
    """Batches of random crops in random order, or of tiles, a size at a time.

    Args:
        dataset: its crops, where it augments, and their order follow from torch's seed when a pass begins.
        batch_size: items.
        num_workers: processes that load; None: by the cores for a GPU, 0 otherwise.
        on_gpu: the batches go to a GPU.
    """
    workers = num_workers if num_workers is not None else min(8, os.cpu_count()) if on_gpu else 0
    if dataset.augment:
        full = len(dataset) >= batch_size  # else the one batch there is
        sampling = {"sampler": RandomDraws(len(dataset)), "batch_size": batch_size, "drop_last": full}
    else:
        sampling = {"batch_sampler": dataset.batches(batch_size)}
    # With a generator of its own a loader draws nothing from torch's, whatever its workers.
    return DataLoader(
        dataset, num_workers=workers, persistent_workers=workers > 0, worker_init_fn=leave_signals_to_main,
        pin_memory=on_gpu, generator=torch.Generator(), **sampling,
    )  # fmt: skip


def leave_signals_to_main(_: int) -> None:
    """A worker outlives Ctrl-C, which reaches it too, until the main process ends it; that is no failure of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def color_jitter(images: Tensor, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """Random brightness, contrast, saturation and hue, drawn for each image of a batch on its own.

    The first three multiply as torchvision's `adjust_*` do, by factors drawn from 1 ± strength; the hue is turned
    about the grey axis by up to ± hue of a full circle. A strength of 0 turns its part off.

    Args:
        images: (N, 3, H, W), uint8, on any device.
        brightness: strength, 0..1.
        contrast: strength, 0..1.
        saturation: strength, 0..1.
        hue: strength as a share of the colour circle, 0..0.5.

    Returns:
        float32 (N, 3, H, W) in 0..1.
    """

    def draw(strength: float) -> Tensor:
        return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(-strength, strength)

    images = images.float() / 255
    images = (images * (1 + draw(brightness))).clamp(0, 1)
    grey = _grey(images).mean((2, 3), keepdim=True)
    images = torch.lerp(grey, images, 1 + draw(contrast)).clamp(0, 1)
    images = torch.lerp(_grey(images), images, 1 + draw(saturation)).clamp(0, 1)
    return _turn_hue(images, 2 * np.pi * draw(hue)) if hue else images


def _grey(images: Tensor) -> Tensor:
    """(N, 1, H, W) luma, ITU-R BT.601, with torchvision's digits."""
    red, green, blue = images.split(1, 1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _turn_hue(images: Tensor, angle: Tensor) -> Tensor:
    """Rotate each colour about the grey axis (Rodrigues' formula) by `angle`, radians, (N, 1, 1, 1)."""
    mean = images.mean(1, keepdim=True)
    cross = (images.roll(1, 1) - images.roll(-1, 1)) / 3**0.5  # the unit grey axis × the colour
    return (mean + (images - mean) * angle.cos() + cross * angle.sin()).clamp(0, 1)


def _decode(paths: tuple[Path, Path, Path]) -> np.ndarray:
    """uint8 (H, W, 7): three bands before, three after, and the mask in {0, 1}."""
    return np.dstack([read_rgb(paths[0]), read_rgb(paths[1]), read_mask(paths[2])])


def _fill_cache(paths: tuple[Path, Path, Path], cache_dir: Path) -> Path:
    """The decoded pair as an .npy file, written unless one of these very files is there already."""
    where = hashlib.sha256("\n".join(str(path.resolve()) for path in paths).encode()).hexdigest()[:12]
    stats = [path.stat() for path in paths]
    state = hashlib.sha256(repr([(s.st_size, s.st_mtime_ns) for s in stats]).encode()).hexdigest()[:12]
    cached = cache_dir / f"{where}-{state}.npy"
    if not cached.exists():
        array = _decode(paths)
        # Written aside and renamed: another process sees the whole file or none.
        with tempfile.NamedTemporaryFile(dir=cache_dir, suffix=".part", delete=False) as part:
            try:
                np.save(part, array)
                part.close()
                os.replace(part.name, cached)
            except BaseException:
                os.unlink(part.name)
                raise
        for stale in glob.glob(f"{glob.escape(str(cache_dir / where))}-*.npy"):
            if stale != str(cached):
                Path(stale).unlink(missing_ok=True)
    return cached
