"""LEVIR-CD pairs from files to batches of tensors: decoded once, cropped, augmented."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data import processes
from data.images import DataError, size_text
from data.pairs import Pairs


class LEVIRCD(Dataset):
    """Pairs of co-registered images and the mask of what changed (LEVIR-CD: Chen and Shi 2020, doi:10.3390/rs12101662).

    An item is `(image_a, image_b, label)`: uint8 (3, H, W), uint8 (3, H, W) and uint8 (1, H, W) in {0, …, num_classes}.
    Without augmentation the items are the tiles of each image in reading order (smaller ones at its right and
    bottom edge, so that every pixel is there once), or whole images. With it, an item is a random crop of the
    same image: turned by a quarter, mirrored and, with one class, its dates swapped, each at random.

    Args:
        root: folder that holds `split/{A,B,label}/NAME.{png,jpg,tif}`, one stem for the three files of a pair.
        split: "train", "val", "test" or any other folder of `root`.
        crop_size: side of a crop or tile in pixels; None for whole images.
        augment: random crops instead of tiles.
        cache_dir: folder for the decoded pairs, 7 bytes a pixel, filled once and shared by all processes;
            None decodes the files at each access.
        num_classes: classes of change; the masks hold 0 and 255, or 0 to `num_classes`.

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
        num_classes: int = 1,
    ) -> None:
        self.folder = Path(root) / split
        self.crop_size, self.augment = crop_size, augment
        self.pairs = Pairs(self.folder, None if cache_dir is None else Path(cache_dir), num_classes)
        sizes = self.pairs.sizes
        if augment and crop_size and (small := np.flatnonzero(sizes.min(1) < crop_size)).size:
            raise DataError(
                f"{self.pairs.paths(small[0])[0]}: {size_text(sizes[small[0]])} pixels are less than the crop of "
                f"{crop_size}: lower CROP_SIZE"
            )
        if augment and not crop_size and (other := np.flatnonzero((sizes != sizes[0]).any(1))).size:
            raise DataError(
                f"{self.pairs.paths(other[0])[0]}: {size_text(sizes[other[0]])} pixels, but {self.pairs.paths(0)[0]} "
                f"has {size_text(sizes[0])}: set a CROP_SIZE"
            )
        self._steps = np.full_like(sizes, crop_size) if crop_size else sizes
        self._tiles = sizes // self._steps if augment else -(-sizes // self._steps)  # rows, columns
        self._ends = self._tiles.prod(1).cumsum()  # of each pair's items

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """The item at an index; with augmentation `(index, seed)` gives the same crop each time."""
        index, seed = key if isinstance(key, tuple) else (key, int(torch.randint(2**31, ())))
        pair, rows, columns = self._tile(index)
        array, swapped = self.pairs.load(pair), False
        if self.augment:
            array, swapped = self._random_crop(array, np.random.default_rng(seed))
        else:
            array = array[rows, columns]
        array = np.ascontiguousarray(array.transpose(2, 0, 1))  # (7, H, W): the one copy
        image_a, image_b, label = torch.from_numpy(array).split([3, 3, 1])
        return (image_b, image_a, label) if swapped else (image_a, image_b, label)

    def name(self, index: int) -> str:
        """What a person calls item `index`: the stem of its files and, for a tile, its row and column in pixels."""
        pair, rows, columns = self._tile(index)
        stem = self.pairs.paths(pair)[0].stem
        return f"{stem} [{rows.start}, {columns.start}]" if self.crop_size else stem

    def files(self, keys: Iterable[int | tuple[int, int]]) -> str:
        """The images before of some items, as `__getitem__` takes them, in one line."""
        indices = (key[0] if isinstance(key, tuple) else key for key in keys)
        return ", ".join(sorted({str(self.pairs.paths(self._tile(index)[0])[0]) for index in indices}))

    def fingerprint(self) -> str:
        """12 hexadecimal digits that change when a file is added, removed, renamed or changes its size."""
        return self.pairs.fingerprint()

    def batches(self, batch_size: int) -> list[list[int]]:
        """All indices in lists of at most `batch_size` items of one height and width, for evaluation."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for index in range(len(self)):
            _, rows, columns = self._tile(index)
            by_size.setdefault((rows.stop - rows.start, columns.stop - columns.start), []).append(index)
        return [same[i : i + batch_size] for same in by_size.values() for i in range(0, len(same), batch_size)]

    def _tile(self, index: int) -> tuple[int, slice, slice]:
        """Pair, rows and columns of an item."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        index %= len(self)
        pair = int(np.searchsorted(self._ends, index, side="right"))
        row, column = divmod(index - int(self._ends[pair]), int(self._tiles[pair, 1]))  # rows from the last one back
        (height, width), (step_y, step_x) = self.pairs.sizes[pair].tolist(), self._steps[pair].tolist()
        y, x = (row + int(self._tiles[pair, 0])) * step_y, column * step_x
        return pair, slice(y, min(y + step_y, height)), slice(x, min(x + step_x, width))

    def _random_crop(self, array: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
        """A crop, turned and mirrored, and whether to exchange its dates, which tell several classes apart."""
        height, width = array.shape[:2]
        size_y, size_x = self.crop_size or height, self.crop_size or width
        y, x = rng.integers(height - size_y + 1), rng.integers(width - size_x + 1)
        crop = array[y : y + size_y, x : x + size_x]
        # A quarter turn of an oblong whole image would not fit into a batch with the others.
        crop = np.rot90(crop, rng.integers(4) if size_y == size_x else 2 * rng.integers(2))
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        return crop, self.pairs.num_classes == 1 and rng.random() < 0.5


class RandomBatches(Sampler):
    """Full batches of indices in random order, each with the seed of its crop; all of it follows from torch's seed.

    Under torchrun each process gets a share of every batch, so that a step is the same however many there are.
    """

    def __init__(self, length: int, batch_size: int):
        self.length, self.batch_size = length, batch_size
        self._drawn = torch.empty(0, 2, dtype=torch.int64)  # in the pass at hand: index and seed

    def __len__(self) -> int:
        return max(1, self.length // self.batch_size)  # 1: a batch that isn't full, if there is no other

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        self._drawn = torch.stack([torch.randperm(self.length), torch.randint(2**31, (self.length,))], dim=1)
        for step in range(len(self)):
            yield processes.shard(self.batch(step))

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The batch of all processes at a step of the pass at hand."""
        return [tuple(draw) for draw in self._drawn[step * self.batch_size :][: self.batch_size].tolist()]


class OrderedBatches(Sampler):
    """Every item once, at most `batch_size` of one size together; under torchrun each process gets a share of these."""

    def __init__(self, dataset: LEVIRCD, batch_size: int):
        self.batches = dataset.batches(batch_size)

    def __len__(self) -> int:
        return len(processes.shard(self.batches))

    def __iter__(self) -> Iterator[list[int]]:
        return iter(processes.shard(self.batches))

    def batch(self, step: int) -> list[int]:
        """The batch of this process at a step."""
        return processes.shard(self.batches)[step]


def make_loader(dataset: LEVIRCD, batch_size: int, num_workers: int | None, on_gpu: bool) -> DataLoader:
    """Batches of random crops in random order, or of tiles, a size at a time.

    Args:
        dataset: its crops, where it augments, and their order follow from torch's seed when a pass begins.
        batch_size: items, of all processes together.
        num_workers: processes that load; None: by the cores for a GPU, 0 otherwise.
        on_gpu: the batches go to a GPU.
    """
    batches = RandomBatches(len(dataset), batch_size) if dataset.augment else OrderedBatches(dataset, batch_size)
    if num_workers is None:
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        num_workers = max(1, min(8, cores)) if on_gpu else 0
    # With a generator of its own a loader draws nothing from torch's, whatever its workers.
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=num_workers, persistent_workers=num_workers > 0,
        worker_init_fn=leave_signals_to_main, pin_memory=on_gpu, generator=torch.Generator(),
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
        of_all = torch.empty(processes.count() * len(images), 1, 1, 1, device=images.device)  # alike in all processes
        return processes.shard(of_all.uniform_(-strength, strength))

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
