"""LEVIR-CD pairs from files to batches of tensors: listed, checked, decoded once, cropped, augmented."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import signal
import struct
import sys
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image
from scipy import ndimage
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

FOLDERS = ("A", "B", "label")  # of a split: images before, images after, masks
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
IGNORED = 255  # in a label: this pixel is neither trained on nor scored
ImageLike = Tensor | np.ndarray | Image.Image | str | os.PathLike
MAX_PIXELS = 400_000_000  # an image may hold, 20,000 × 20,000: a small file of a stranger may unpack to more


class LEVIRCD(Dataset):
    """Pairs of co-registered images and the mask of what changed (LEVIR-CD: Chen and Shi 2020, doi:10.3390/rs12101662).

    An item is `(image_a, image_b, label)`: uint8 (3, H, W), uint8 (3, H, W) and uint8 (1, H, W) in {0, …, num_classes}
    or, where a pixel is void in an image or is to be ignored, 255.
    Without augmentation the items are the tiles of each image in reading order (smaller ones at its right and
    bottom edge, so that every pixel is there once), or whole images. With it, an item is a random crop around a place
    in a tile, turned by a quarter and mirrored at random; its dates may be exchanged, too.

    Args:
        root: folder that holds `split/{A,B,label}/NAME.{png,jpg,tif,bmp}`, one stem for the three files of a pair; they
            may lie in folders below A, the same below B and label.
        split: "train", "val", "test" or any other folder of `root`; where there is no val, a tenth of train's pairs,
            chosen by their names, is val and not train.
        crop_size: side of a crop or tile in pixels; None for whole images.
        augment: random crops instead of tiles.
        cache_dir: folder for the decoded pairs, 7 bytes a pixel, filled once and shared by all processes;
            None decodes the files at each access.
        num_classes: classes of change; the masks hold 0 and 255, or 0 to `num_classes`.
        ignore: value in the masks of pixels to ignore; None: there is none.
        folders: names of the folders of a split, as `FOLDERS`.
        swap_dates: chance that the dates of a random crop are exchanged, 0..1.

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
        ignore: int | None = None,
        folders: Sequence[str] = FOLDERS,
        swap_dates: float = 0.0,
    ) -> None:
        self.folder = Path(root).expanduser() / split
        self.crop_size, self.augment, self.swap_dates = crop_size, augment, swap_dates
        cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.pairs = Pairs(self.folder, cache_dir, num_classes, ignore, folders)
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
        sides = np.full_like(sizes, crop_size) if crop_size else sizes
        self._tiles = sizes // sides if augment else -(-sizes // sides)  # rows, columns
        self._steps = sizes // self._tiles if augment else sides
        self._ends = self._tiles.prod(1).cumsum()  # of each pair's items

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """The item at an index; with augmentation `(index, seed)` gives the same crop each time."""
        index, seed = key if isinstance(key, tuple) else (key, int(torch.randint(2**31, ())))
        pair, rows, columns = self._tile(index)
        array = self.pairs.load(pair)
        if self.augment:
            array = self._random_crop(array, (rows, columns), np.random.default_rng(seed))
        else:
            array = array[rows, columns]
        array = np.ascontiguousarray(array.transpose(2, 0, 1))  # (7, H, W): the one copy
        return torch.from_numpy(array).split([3, 3, 1])

    def name(self, index: int) -> str:
        """What a person calls item `index`: the stem of its files and, for a tile, its row and column in pixels."""
        pair, rows, columns = self._tile(index)
        stem = self.pairs.paths(pair)[0].stem
        return f"{stem} [{rows.start}, {columns.start}]" if self.crop_size else stem

    def fingerprint(self) -> str:
        """12 hexadecimal digits that change when a file is added, removed, renamed or changes its size."""
        return self.pairs.fingerprint()

    @property
    def has_change(self) -> bool:
        """Whether any pixel of any mask is labelled as changed."""
        return bool(self.pairs.facts[:, 2].any())

    def batches(self, pixels: int) -> list[list[int]]:
        """All indices in lists of items of one size, each of at most so many pixels or of one item, for evaluation."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for index in range(len(self)):
            _, rows, columns = self._tile(index)
            by_size.setdefault((rows.stop - rows.start, columns.stop - columns.start), []).append(index)
        batches = []
        for (height, width), same in by_size.items():
            count = max(1, pixels // (height * width))
            batches += [same[i : i + count] for i in range(0, len(same), count)]
        return batches

    def _tile(self, index: int) -> tuple[int, slice, slice]:
        """Pair, rows and columns of an item."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        index %= len(self)
        pair = int(np.searchsorted(self._ends, index, side="right"))
        (rows, columns), end = self._tiles[pair].tolist(), int(self._ends[pair])
        row, column = divmod(index - end + rows * columns, columns)
        (height, width), (step_y, step_x) = self.pairs.sizes[pair].tolist(), self._steps[pair].tolist()
        y, x = row * step_y, column * step_x
        return pair, slice(y, min(y + step_y, height)), slice(x, min(x + step_x, width))

    def _random_crop(self, array: np.ndarray, tile: tuple[slice, slice], rng: np.random.Generator) -> np.ndarray:
        """A crop around a place in the tile, turned, mirrored, its dates exchanged, each at random.

        At the image's border it is moved inwards: of crops that are anywhere in the image alike few hold its borders,
        hardly one a corner. The array is as in `Pairs.load`: read-only, and whatever moves its pixels moves all seven
        bands alike, the last one, a mask, without blending its values. What changes colours comes later, in
        `color_jitter`.
        """
        window = []
        for side, length in zip(tile, array.shape[:2], strict=True):
            size = self.crop_size or length
            start = min(max(rng.integers(side.start, side.stop) - size // 2, 0), length - size)
            window.append(slice(start, start + size))
        crop = array[tuple(window)]
        # A quarter turn of an oblong whole image would not fit into a batch with the others.
        crop = np.rot90(crop, rng.integers(4) if crop.shape[0] == crop.shape[1] else 2 * rng.integers(2))
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        if rng.random() < self.swap_dates:
            crop = crop[..., [3, 4, 5, 0, 1, 2, 6]]
        return crop


# Batches


class RandomBatches(Sampler):
    """Full batches of indices in random order, each with the seed of its crop; all of it follows from torch's seed.

    A process `rank` of `world` gets a share of every batch, so that a step is the same however many there are.

    Raises:
        DataError: there are several processes, and no full batch to share.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world: int = 1):
        if length < batch_size and world > 1:
            raise DataError(f"{length} crops to train on are no batch of {batch_size} to share: lower BATCH_SIZE")
        self.length, self.batch_size, self.rank, self.world = length, batch_size, rank, world

    def __len__(self) -> int:
        return max(1, self.length // self.batch_size)  # 1: a batch that isn't full, if there is no other

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        drawn = torch.stack([torch.randperm(self.length), torch.randint(2**31, (self.length,))], dim=1)
        for batch in drawn[: len(self) * self.batch_size].split(self.batch_size):
            yield [tuple(draw) for draw in batch[self.rank :: self.world].tolist()]


def make_loader(
    dataset: LEVIRCD, batches: Sampler | Sequence[list[int]], num_workers: int | None, on_gpu: bool
) -> DataLoader:
    """The batches of a data set.

    Args:
        dataset: what is loaded from.
        batches: the items of each batch: `RandomBatches` to train on, a share of `dataset.batches()` to evaluate.
        num_workers: processes that load; None: by the cores for a GPU, 0 otherwise.
        on_gpu: the batches go to a GPU.
    """
    if num_workers is None:
        num_workers = max(1, min(8, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))) if on_gpu else 0
    # With a generator of its own a loader draws nothing from torch's, whatever its workers.
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=num_workers, persistent_workers=num_workers > 0,
        worker_init_fn=leave_signals_to_main, pin_memory=on_gpu, generator=torch.Generator(),
    )  # fmt: skip


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine has under taskset or in a container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # no control groups, or no limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def leave_signals_to_main(_: int) -> None:
    """A worker outlives Ctrl-C, which reaches it too, until the main process ends it; that is no failure of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: os._exit(0))


# Colours


def color_jitter(
    images: Tensor, brightness: float, contrast: float, saturation: float, hue: float, rank: int = 0, world: int = 1
) -> Tensor:
    """Random brightness, contrast, saturation and hue, drawn for each image of a batch on its own.

    This is the augmentation that changes values and not places, on the device; `LEVIRCD._random_crop` is the other.
    The first three multiply as torchvision's `adjust_*` do, by factors drawn from 1 ± strength; the hue is turned
    about the grey axis by up to ± hue of a full circle. A strength of 0 turns its part off. All four are linear, so
    that they are one matrix for each image, and what leaves 0..1 is cut off once, at the end.

    Args:
        images: (N, 3, H, W), uint8, on any device.
        brightness: strength, 0..1.
        contrast: strength, 0..1.
        saturation: strength, 0..1.
        hue: strength as a share of the colour circle, 0..0.5.
        rank: which of `world` processes has this share of a batch: the draws are those that one process would make.
        world: how many there are.

    Returns:
        float32 (N, 3, H, W) in 0..1.
    """

    def draw(middle: float, strength: float) -> Tensor:
        of_all = torch.empty(world * len(images), 1, 1, device=images.device)
        return of_all.uniform_(middle - strength, middle + strength)[rank::world]

    pixels = images.flatten(2) / 255  # (N, 3, H·W), float32
    bright, contrasting, saturated = (draw(1, strength) for strength in (brightness, contrast, saturation))
    luma = torch.tensor(LUMA).to(images.device, non_blocking=True)  # a host that blocks here waits for the last step
    own = torch.eye(3, device=images.device)
    matrix = _turn_hue(draw(0, 2 * np.pi * hue)) @ torch.lerp(luma.expand(3, 3), own, saturated)
    grey = bright * (luma @ pixels.mean(2, keepdim=True))  # (N, 1, 1), about which contrast is stretched
    offset = (1 - contrasting) * grey * matrix.sum(2, keepdim=True)
    return torch.baddbmm(offset, contrasting * bright * matrix, pixels).clamp_(0, 1).view(images.shape)


LUMA = [[0.2989, 0.587, 0.114]]  # of red, green, blue: ITU-R BT.601, with torchvision's digits
# Of a colour: its part along the unit grey axis (1, 1, 1) / √3, the rest, and the cross product with the axis.
AXIS = 3**-0.5
GREY_REST_CROSS = (
    [[1 / 3] * 3] * 3,
    [[2 / 3, -1 / 3, -1 / 3], [-1 / 3, 2 / 3, -1 / 3], [-1 / 3, -1 / 3, 2 / 3]],
    [[0, -AXIS, AXIS], [AXIS, 0, -AXIS], [-AXIS, AXIS, 0]],
)


def _turn_hue(angle: Tensor) -> Tensor:
    """(N, 3, 3), which rotate colours about the grey axis (Rodrigues' formula) by `angle`, radians, (N, 1, 1)."""
    grey, rest, cross = torch.tensor(GREY_REST_CROSS).to(angle.device, non_blocking=True)
    return torch.addcmul(torch.addcmul(grey, rest, angle.cos()), cross, angle.sin())


# Files


class DataError(ValueError):
    """Input that can't be used; the message says what is wrong, in which file, and what to do."""


class Pairs:
    """Image before, image after and mask of each pair of a split, in the order of their names.

    What is known of them stands in arrays, not in an object for each file: the processes that load share these.

    Args:
        folder: holds `{A,B,label}/NAME.{png,jpg,tif,bmp}`.
        cache_dir: keeps what was checked and decoded, until a file changes its size or time; None: nothing is kept.
        num_classes: classes of change in the masks.
        ignore: value in the masks of pixels to ignore.
        folders: names of the three folders.

    Attributes:
        facts: int64 (pairs, 4): height and width in pixels; how many of these are labelled as changed; in which way
            the mask is odd, an index of `ODD`.

    Raises:
        DataError: a file is missing, can't be read or is no such image, or a pair has more than one size.
    """

    def __init__(
        self, folder: Path, cache_dir: Path | None, num_classes: int = 1, ignore: int | None = None,
        folders: Sequence[str] = FOLDERS,
    ):  # fmt: skip
        self.folder, self.cache_dir, self.num_classes, self.ignore = folder, cache_dir, num_classes, ignore
        self.folders = tuple(folders)
        self._names = np.array(self._find())  # str (pairs, 3)
        files = ((part, name) for names in self._names for part, name in zip(self.folders, names, strict=True))
        stats = (os.stat(f"{self.folder}/{part}/{name}") for part, name in files)
        stats = np.fromiter(((stat.st_size, stat.st_mtime_ns) for stat in stats), np.dtype((np.int64, 2)))
        self._stats = stats.reshape(-1, len(self.folders), 2)  # bytes, nanoseconds
        self._root = str(self.folder.resolve())
        if cache_dir is None:
            self.facts = self._checked()
        else:
            try:
                os.makedirs(cache_dir, exist_ok=True)
                self._fill_cache()
            except OSError as error:
                raise DataError(f"CACHE_DIR={cache_dir}: can't be filled ({error}); None does without") from error
        self.sizes = self.facts[:, :2]
        for kind, reading in enumerate(ODD[1:], 1):
            if (odd := np.flatnonzero(self.facts[:, 3] == kind)).size:
                say_once(f"{folder}: {odd.size} of {len(self)} masks {reading} (the first is {self.paths(odd[0])[2]})")

    def __len__(self) -> int:
        return len(self._names)

    def _find(self) -> list[tuple[str, ...]]:
        """The names of the pairs; of those in train, where there is no val beside it, a tenth is val."""
        train, split = self.folder.with_name("train"), self.folder.name
        if split not in ("train", "val") or self.folder.with_name("val").is_dir() or not train.is_dir():
            return find_pairs(*(self.folder / part for part in self.folders))
        names = find_pairs(*(train / part for part in self.folders))
        held_out = set(sorted(names, key=lambda files: _digits(files[0].encode()))[: -(-len(names) // 10)])
        if len(names) == 1:
            if split == "val":
                raise DataError(f"{self.folder}: no such folder, and train holds one pair alone: add val")
            return names
        say_once(f"{train.parent}: no val in it; {len(held_out)} of train's {len(names)} pairs, chosen by their names, "
                 "serve for validation instead of training")  # fmt: skip
        self.folder = train
        return [files for files in names if (files in held_out) == (split == "val")]

    def paths(self, pair: int) -> tuple[Path, ...]:
        """The three files of a pair."""
        return tuple(self.folder / part / name for part, name in zip(self.folders, self._names[pair], strict=True))

    def load(self, pair: int) -> np.ndarray:
        """uint8 (H, W, 7): three bands before, three after, the label; of a cached one only what is used."""
        if self.cache_dir is None:
            return self._decode(pair)
        try:
            return np.load(self._cached(pair), mmap_mode="r")
        except (OSError, ValueError, EOFError):  # gone or damaged since it was filled
            self._decode_into_cache(pair)
            return np.load(self._cached(pair), mmap_mode="r")

    def fingerprint(self) -> str:
        """12 hexadecimal digits that change when a file is added, removed, renamed or changes its size."""
        rows = zip(self._names.tolist(), self._stats[..., 0].tolist(), strict=True)
        files = [file for names, sizes in rows for file in zip(self.folders, names, sizes, strict=True)]
        return _digits("".join(f"{part}/{name} {size}\n" for part, name, size in files).encode())

    def _fill_cache(self) -> None:
        """Check and decode what hasn't been yet, and drop what was made of files as they were before."""
        state = _digits(self._names.tobytes() + self._stats.tobytes() + repr([self.num_classes, self.ignore]).encode())
        done = self.cache_dir / f"{_digits(self._root.encode())}-{state}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):
            self.facts = np.load(done)
            return
        self.facts = self._checked()
        names = [self._cached(pair).name for pair in range(len(self))]
        present = set(os.listdir(self.cache_dir))
        self._each(self._decode_into_cache, [i for i, name in enumerate(names) if name not in present], "decoding")
        with written_whole(done, "wb") as file:
            np.save(file, self.facts)
        ours = {name.partition("-")[0] for name in (done.name, *names)}
        for name in present.difference(names, [done.name]):
            if name.endswith(".npy") and name.partition("-")[0] in ours:
                (self.cache_dir / name).unlink(missing_ok=True)

    def _checked(self) -> np.ndarray:
        def check(pair: int) -> tuple[int, ...]:
            size, (label, odd) = check_headers(self.paths(pair)), self._read_mask(pair)
            return *size, np.count_nonzero(label % IGNORED), odd

        return np.array(self._each(check, range(len(self)), "checking"))

    def _each(self, work: Callable[[int], object], pairs: Sequence[int], verb: str) -> list:
        with ThreadPool(usable_cores()) as pool:
            done = pool.imap(work, pairs, chunksize=4)
            return list(progress(done, desc=f"{verb} {self.folder}", total=len(pairs), unit="pair", delay=1))

    def _cached(self, pair: int) -> Path:
        files = zip(self.folders, self._names[pair].tolist(), strict=True)
        where = _digits("\n".join(f"{self._root}/{part}/{name}" for part, name in files).encode())
        state = _digits(repr([self.num_classes, self.ignore, self._stats[pair].tolist()]).encode())
        return self.cache_dir / f"{where}-{state}.npy"

    def _decode_into_cache(self, pair: int) -> None:
        with written_whole(self._cached(pair), "wb") as file:
            np.save(file, self._decode(pair))

    def _decode(self, pair: int) -> np.ndarray:
        (image_a, void_a), (image_b, void_b) = map(read_image, self.paths(pair)[:2])
        label, _ = self._read_mask(pair)
        for void in (void_a, void_b):
            if void is not None:
                label[void] = IGNORED
        return np.dstack([image_a, image_b, label])

    def _read_mask(self, pair: int) -> tuple[np.ndarray, int]:
        return read_mask(self.paths(pair)[2], self.num_classes, self.ignore)


def find_pairs(*folders: Path) -> list[tuple[str, ...]]:
    """Names of the files that share a stem, one a folder, in the order of the stems; DataError where one is missing.

    A name is a file's path below its folder. Composed and decomposed letters (Unicode's NFC and NFD) are one.
    """
    found: list[dict[str, str]] = []
    for folder in folders:
        if not folder.is_dir():
            names = ", ".join(each.name for each in folders)
            raise DataError(f"{folder}: no such folder; looked for are {names} (see data/README.md, and FOLDERS)")
        files: dict[str, str] = {}
        for name in _images_below(folder):
            stem = unicodedata.normalize("NFC", os.path.splitext(name)[0])
            if stem in files:
                raise DataError(f"{folder / name}: a second file beside {files[stem]} for one pair; remove one")
            files[stem] = name
        found.append(files)
    stems = sorted(set().union(*found))
    if not stems:
        raise DataError(f"{' and '.join(map(str, folders))}: no images ({', '.join(sorted(SUFFIXES))})")
    for stem in stems:
        for folder, files in zip(folders, found, strict=True):
            if stem not in files:
                there = next(Path(at, other[stem]) for at, other in zip(folders, found, strict=True) if stem in other)
                raise DataError(f"{there}: no file of that name in {folder}; add it or remove this one")
    return [tuple(files[stem] for files in found) for stem in stems]


def _images_below(folder: Path, below: str = "") -> Iterator[str]:
    """Names of the images in a folder and in those below it, but for hidden ones."""
    for entry in os.scandir(folder / below):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images_below(folder, f"{below}{entry.name}/")
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file():
            yield below + entry.name


def check_headers(paths: tuple[Path, ...]) -> tuple[int, int]:
    """The height and width that two images, and the mask if there is a third file, share; DataError if they don't."""
    sizes = []
    for index, path in enumerate(paths):
        with open_image(path, mask=index == 2) as image:
            sizes.append(image.size[::-1])
    for path, size in zip(paths[1:], sizes[1:], strict=True):
        if size != sizes[0]:
            raise DataError(
                f"{path}: {size_text(size)} pixels, but {paths[0]} has {size_text(sizes[0])}; a pair needs one size"
            )
    return sizes[0]


def read_rgb(path: Path) -> np.ndarray:
    """uint8 (H, W, 3) of an image; DataError as `read_image`."""
    return read_image(path)[0]


def read_image(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """An 8-bit image, and where it is void: transparent, masked, or of its tag's "no data" in all three bands.

    Returns:
        uint8 (H, W, 3); bool (H, W), None where nothing is void.

    Raises:
        DataError: not such an image, damaged, larger than `MAX_PIXELS`, void all over, or half transparent.
    """
    with open_image(path) as image:
        try:
            voids = [_void(path, image)] if image.format == "TIFF" else []
            alpha = np.asarray(image.convert("RGBA").getchannel("A")) if image.has_transparency_data else None
            rgb = np.empty((image.height, image.width, 3), np.uint8)
            for y in range(0, image.height, 1024):  # in pieces: Pillow's own way makes two copies on its way
                piece = image.crop((0, y, image.width, min(y + 1024, image.height)))
                rgb[y : y + 1024] = piece if piece.mode == "RGB" else piece.convert("RGB")
        except Exception as error:
            raise DataError(f"{path}: damaged or cut short ({error}); replace the file") from error
        if (no_data := no_data_value(image)) is not None:
            voids.append((rgb == no_data).all(-1))
    if alpha is not None:
        if ((alpha > 0) & (alpha < 255)).any():
            raise DataError(f"{path}: partly transparent: a pixel is void or it isn't; flatten it to RGB")
        voids.append(alpha == 0)
    void = np.logical_or.reduce([each for each in voids if each is not None] or [np.zeros(1, bool)])
    if void.all():
        raise DataError(f"{path}: void all over: transparent, masked or of the value that its tag calls no data")
    return rgb, void if void.any() else None


def no_data_value(image: Image.Image) -> int | None:
    """The value that GDAL's tag calls no data, where a pixel of 8 bits can have it."""
    value = getattr(image, "tag_v2", {}).get(NO_DATA)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        value = float(value.strip(" \0") if isinstance(value, str) else value)
        return int(value) if value in range(256) else None
    return None


# What may be odd about a mask, and how it is read then.
ODD = (
    "", "hold other values than 0 and 255: from 128 on it is change", "are coloured: what isn't black is change",
    "have more than 8 bits: their highest value is change",
)  # fmt: skip
NEAR = 32  # a value of a mask is so near to 0 or to 255, but for a few along edges


def read_mask(path: Path, num_classes: int = 1, ignore: int | None = None) -> tuple[np.ndarray, int]:
    """A mask of the values 0 to `num_classes` or, of one class, of 0 and 255 or what comes near.

    Returns:
        uint8 (H, W) in {0, …, num_classes} or `IGNORED`; in which way it is odd, an index of `ODD`.

    Raises:
        DataError: as `read_image`, or it is no mask, or can be read in two ways.
    """
    values, odd = _mask_values(path, num_classes)
    ignored = values == (-1 if ignore is None else ignore)
    counts = np.bincount(values[~ignored], minlength=256)
    present = np.flatnonzero(counts).tolist()
    highest, below = max(present, default=0), [value for value in present[:-1] if value]
    # Other values than the two are the traces of an edge or of a JPEG if they are near these and on both sides.
    is_near = counts[NEAR : 256 - NEAR].sum() < 0.05 * values.size and highest > 127
    if highest <= num_classes:
        label = values.copy()
    elif num_classes == 1 and highest > 127 and not below:
        label, odd = (values == highest).astype(np.uint8), odd or int(highest < 255)
    elif num_classes == 1 and is_near and any(value > 127 for value in below):
        label, odd = (values > 127).astype(np.uint8), odd or 1
    else:
        meant = "0 and 255 (or 0 and 1)" if num_classes == 1 else f"0 to {num_classes}"
        shown = ", ".join(map(str, present[:6])) + (", …" if len(present) > 6 else "")
        two = highest == 255 and max(below, default=0) < 128
        advice = "save it as PNG"
        if two:  # readings
            advice = "give IGNORE=255 if 255 is not to be looked at, or make the other values 0 if 255 is change"
        raise DataError(
            f"{path}: a mask holds {meant} alone where NUM_CLASSES={num_classes}, this one {shown}; {advice}"
        )
    label[ignored] = IGNORED
    return label, odd


def _mask_values(path: Path, num_classes: int) -> tuple[np.ndarray, int]:
    """One number a pixel, uint8 (H, W), of a mask in greys, colours, a palette or many bits; its way of being odd."""
    with open_image(path, mask=True) as image:
        try:
            see_through = image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255
            paletted, pixels = image.mode == "P", np.array(image)
            colours = np.array(image.convert("RGB")) if paletted or pixels.ndim > 2 else None
        except Exception as error:
            raise DataError(f"{path}: damaged or cut short ({error}); replace the file") from error
    if see_through:
        raise DataError(f"{path}: partly transparent; a mask is opaque")
    if colours is None and pixels.dtype in (np.uint8, bool):
        return pixels.astype(np.uint8), 0
    if colours is None:
        least, most = pixels.min(), pixels.max()
        if not (least >= 0 and np.isfinite(most)):
            raise DataError(f"{path}: a mask holds no negative values, this one {least} to {most}")
        if most < 256 and (pixels == np.floor(pixels)).all():
            return pixels.astype(np.uint8), 0
        return (pixels / most * 255).round().astype(np.uint8), 3
    black = ~colours.any(-1)
    if paletted and (num_classes > 1 or (pixels.max() < 2 and not black.any())):
        return pixels, 0  # numbers, in whatever colours they are shown
    values = (colours.max(-1) > 0) * np.uint8(255) if paletted else colours.max(-1)
    if (colours == colours[..., :1]).all():
        return (values if not paletted or colours.max() != 1 else colours[..., 0]), 0
    hues = np.unique(colours[values > values.max() - NEAR] > (0 if paletted else 127), axis=0)
    if num_classes > 1:
        raise DataError(f"{path}: coloured; the classes of a mask are numbers, as grey values or of a palette")
    if len(hues) != 1 or not black.any():
        raise DataError(
            f"{path}: a mask holds 0 and 255, or one colour on black, this one is a picture or holds several colours"
        )
    return values, 0 if hues.all() else 2


NO_DATA, SUBFILE, BITS, PHOTOMETRIC, BANDS, EXTRA_BANDS = 42113, 254, 258, 262, 277, 338  # TIFF's tags
RGB_PAGE, GREY_PAGE, MASK_PAGE = 2, 1, 4  # values of these


def open_image(path: Path, mask: bool = False) -> Image.Image:
    """The image with its header read and its kind checked, its pixels not decoded yet."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # beyond twice as many Pillow itself refuses
    try:
        image = Image.open(path)
    except Image.UnidentifiedImageError as error:
        image = _repaired_tiff(path)
        if image is None:
            kind = "no image that can be read" if Path(path).stat().st_size else "empty"
            raise DataError(
                f"{path}: can't be read as an image of one band or three ({kind}); replace it, or make it "
                f"readable by gdal_translate -ot Byte -b 1 -b 2 -b 3 -co PHOTOMETRIC=RGB"
            ) from error
    except Exception as error:  # what Pillow's readers meet in a broken file, they raise
        raise DataError(f"{path}: can't be read as an image of one band or three ({error}); replace it") from error
    try:
        complaint = _complaint(path, image, mask)
    except Exception as error:
        raise DataError(f"{path}: can't be read as an image of one band or three ({error}); replace it") from error
    if complaint:
        image.close()
        raise DataError(f"{path}: {complaint}")
    return image


class Tiff:
    """The directories of a TIFF, also of the kinds that Pillow doesn't know; each has the places of its tags' entries.

    Raises:
        ValueError, struct.error: no TIFF, or a damaged one.
    """

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self.data[:2] not in (b"II", b"MM"):
            raise ValueError("no TIFF")
        self.order, self.big = "<" if self.data[:2] == b"II" else ">", 43 in self.data[2:4]
        number, entry, pointer, at = ("Q", 20, "Q", 8) if self.big else ("H", 12, "I", 4)
        self.directories: dict[int, dict[int, int]] = {}  # by their place in the file
        while (place := self._read(pointer, at)) and place not in self.directories:
            first = place + struct.calcsize(number)
            at = first + self._read(number, place) * entry
            self.directories[place] = {self._read("H", each): each for each in range(first, at, entry)}

    def _read(self, kind: str, at: int) -> int:
        return struct.unpack_from(self.order + kind, self.data, at)[0]

    def value(self, directory: dict[int, int], tag: int) -> int:
        """A short or long number that stands in its entry; 0 where it is missing."""
        at = directory.get(tag)
        return self._read("I" if self._read("H", at + 2) == 4 else "H", at + 8 + 4 * self.big) if at else 0

    def pages(self) -> int:
        """How many of the directories are images of the first one's size, and neither overviews nor masks."""
        every = self.directories.values()
        images = [(self.value(each, 256), self.value(each, 257)) for each in every if not self.value(each, SUBFILE)]
        return images.count(images[0]) if images else 1

    def image(self, place: int, photometric: int) -> Image.Image:
        """What a directory holds, with another photometric interpretation; a band beyond three is left out."""
        data, directory = bytearray(self.data), self.directories[place]
        struct.pack_into(self.order + ("Q" if self.big else "I"), data, 8 if self.big else 4, place)
        struct.pack_into(self.order + "H", data, directory[PHOTOMETRIC] + 8 + 4 * self.big, photometric)
        if at := directory.get(EXTRA_BANDS):
            if self.value(directory, BANDS) == 3:
                struct.pack_into(self.order + "H", data, at, 65000)  # a private tag, which is passed over
            else:
                form = self.order + ("QHH" if self.big else "IHH")
                struct.pack_into(form, data, at + 4, 1, 0, 0)  # one more, of no meaning
        return Image.open(BytesIO(data))


def _repaired_tiff(path: Path) -> Image.Image | None:
    """A TIFF of three bands or four that calls itself grey, as GDAL writes them unless told otherwise, as RGB."""
    with contextlib.suppress(OSError, ValueError, struct.error, LookupError, Image.UnidentifiedImageError):
        tiff = Tiff(path)
        place, directory = next(iter(tiff.directories.items()))
        return tiff.image(place, RGB_PAGE) if tiff.value(directory, BANDS) in (3, 4) else None
    return None


def _void(path: Path, image: Image.Image) -> np.ndarray | None:
    """Where a TIFF's own mask, a page of one bit, calls it void."""
    with contextlib.suppress(ValueError, struct.error):
        tiff = Tiff(path)
        for place, directory in tiff.directories.items():
            size = tiff.value(directory, 256), tiff.value(directory, 257)
            if tiff.value(directory, SUBFILE) == MASK_PAGE and size == image.size:
                with tiff.image(place, GREY_PAGE) as page:
                    return np.asarray(page.convert("L")) == 0
    return None


def _complaint(path: Path, image: Image.Image, mask: bool) -> str | None:
    """Why an image is of no use, from its header."""
    if image.width * image.height > MAX_PIXELS:
        return f"{image.width} × {image.height} pixels are more than {MAX_PIXELS:,}; cut it, or raise --max-pixels"
    exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}  # else it would decode the PNG
    if exif.get(ExifTags.Base.Orientation, 1) != 1:  # viewers turn it, and so does who labels it
        return "turned by its orientation tag; save it upright, without the tag"
    pages = Tiff(path).pages() if image.format == "TIFF" else getattr(image, "n_frames", 1)
    if pages > 1:
        return f"{pages} pages; save the one that is meant"
    raw_mode = image.tile[0].args if image.tile else ""
    raw_mode = raw_mode if isinstance(raw_mode, str) else str(raw_mode[0])
    bits = getattr(image, "tag_v2", {}).get(BITS, 8)
    deep = ";16" in raw_mode or image.mode[0] in "IF" or np.max(bits) > 8
    if deep and not (mask and image.mode[0] in "IF"):  # Pillow drops the low byte of 16-bit colour in silence
        return (f"more than 8 bits a band ({raw_mode or image.mode}); scale it to 8-bit RGB: "
                "gdal_translate -ot Byte -scale")  # fmt: skip
    if not deep and image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX"):
        return f"colour mode {image.mode}; convert it to 8-bit RGB"
    if image.mode in ("1", "L", "LA") and not mask:
        return "one band, grey; an image needs three, red, green and blue"
    return None


def connected_areas(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The areas of one class that hang together, by sides, not by corners, of an integer (H, W), 0 where there is none.

    Returns:
        int32 (H, W), 0 or the number of an area, from 1 on; and the class of each, (count,).
    """
    areas, classes = np.zeros(mask.shape, np.int32), np.zeros(0, mask.dtype)
    for kind in range(1, int(mask.max(initial=0)) + 1):
        found, count = ndimage.label(mask == kind)
        found[found > 0] += len(classes)
        areas += found
        classes = np.append(classes, np.full(count, kind, mask.dtype))
    return areas, classes


class Objects:
    """The changed objects of a label and of a prediction, and which of them are one.

    Of one class both, they match where the intersection is at least half of the union; one to one, the best first.

    Args:
        predicted: (H, W), 0 where nothing changed, else the class.
        label: likewise; what is 255 there counts as unchanged in both.

    Attributes:
        predicted, labelled: int32 (H, W), as of `connected_areas`.
        right: bool, of each predicted object whether it is matched.
        found: bool, of each labelled object.
    """

    def __init__(self, predicted: np.ndarray, label: np.ndarray):
        counted = label != IGNORED
        self.predicted, predicted_classes = connected_areas(predicted * counted)
        self.labelled, labelled_classes = connected_areas(label * counted)
        self.right, self.found = np.zeros(len(predicted_classes), bool), np.zeros(len(labelled_classes), bool)
        both = (self.predicted > 0) & (self.labelled > 0)
        pairs, overlap = np.unique(np.stack([self.predicted[both], self.labelled[both]]), axis=1, return_counts=True)
        (ours, theirs), sizes = pairs, [np.bincount(each.ravel()) for each in (self.predicted, self.labelled)]
        iou = overlap / (sizes[0][ours] + sizes[1][theirs] - overlap)
        iou[predicted_classes[ours - 1] != labelled_classes[theirs - 1]] = 0
        for i in (-iou).argsort(kind="stable"):
            one, other = ours[i] - 1, theirs[i] - 1
            if iou[i] >= 0.5 and not self.right[one] and not self.found[other]:
                self.right[one] = self.found[other] = True


def as_tensor(image: ImageLike) -> Tensor:
    """(3, H, W), uint8 or float, of an image however it is given; DataError where it is something else."""
    if isinstance(image, str | os.PathLike):
        image = read_rgb(Path(image).expanduser())
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
        image = torch.from_numpy(np.require(image, requirements="CW")).permute(2, 0, 1)
    kind = f"{image.dtype} {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
    if not torch.is_tensor(image) or not re.match(r"torch\.(uint8|float\d*) \(3, \d+, \d+\)", kind):
        raise DataError(
            f"an image is a file, a PIL image, a uint8 array (H, W, 3) or a uint8 or float tensor (3, H, W), not {kind}"
        )
    if image.dtype != torch.uint8 and not -1e-3 <= image.min() <= image.max() <= 1.001:
        raise DataError(f"a float image is in 0..1, not {image.min():.3g} to {image.max():.3g}: divide it by 255")
    return image if image.dtype == torch.uint8 else image.float()


_said: set[str] = set()


def say_once(line: str) -> None:
    """Print a line, however often a split is read and however many processes read it."""
    if line not in _said and os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
    _said.add(line)


class Lines:
    """Where a bar is drawn that no terminal shows: each state of it becomes a line of its own."""

    def __init__(self, file: IO):
        self.write = lambda text: file.write(text.strip() + "\n") if text.strip() else 0
        self.flush = file.flush


def progress(iterable: Iterable | None = None, **options: object) -> tqdm:
    """A bar in a terminal; elsewhere, such as in a log, a line a minute; of the first process alone."""
    options["disable"] = os.environ.get("RANK", "0") != "0"
    if sys.stderr.isatty():
        return tqdm(iterable, leave=False, **options)
    return tqdm(
        iterable, leave=False, file=Lines(sys.stderr), **options | {"delay": 60, "mininterval": 60, "miniters": 1}
    )


def size_text(size: tuple[int, int]) -> str:
    """Height and width as people write them."""
    return f"{size[1]} × {size[0]}"


def _digits(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


@contextlib.contextmanager
def written_whole(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file to write, which is at `path` once all of it is on the disk; after an error the old one is still there.

    Raises:
        OSError: it can't be written; the message names the file.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")  # other machines may write here at once
    try:
        text = {} if "b" in mode else {"newline": "", "encoding": "utf-8"}
        with open(part, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path}: can't be written ({error.strerror or error}); what was there is kept") from error
    finally:
        part.unlink(missing_ok=True)
