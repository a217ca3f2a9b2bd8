"""LEVIR-CD pairs from files to batches of tensors: listed, checked, decoded once, cropped, augmented."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

PARTS = ("A", "B", "label")
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
ImageLike = Tensor | np.ndarray | str | os.PathLike
MAX_PIXELS = 400_000_000  # an image may hold, 20,000 × 20,000: a small file of a stranger may unpack to more


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


# Batches


class RandomBatches(Sampler):
    """Full batches of indices in random order, each with the seed of its crop; all of it follows from torch's seed.

    A process `rank` of `world` gets a share of every batch, so that a step is the same however many there are.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world: int = 1):
        self.length, self.batch_size, self.rank, self.world = length, batch_size, rank, world

    def __len__(self) -> int:
        return max(1, self.length // self.batch_size)  # 1: a batch that isn't full, if there is no other

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        drawn = torch.stack([torch.randperm(self.length), torch.randint(2**31, (self.length,))], dim=1)
        for batch in drawn[: len(self) * self.batch_size].split(self.batch_size):
            yield [tuple(draw) for draw in batch[self.rank :: self.world].tolist()]


def make_loader(
    dataset: LEVIRCD, batch_size: int, num_workers: int | None, on_gpu: bool, rank: int = 0, world: int = 1
) -> DataLoader:
    """Batches of random crops in random order, or of tiles, a size at a time.

    Args:
        dataset: its crops, where it augments, and their order follow from torch's seed when a pass begins.
        batch_size: items, of all processes together.
        num_workers: processes that load; None: by the cores for a GPU, 0 otherwise.
        on_gpu: the batches go to a GPU.
        rank: which of the processes that train together this is; it gets a share of each random batch, and of the
            tiles' batches every `world`-th.
        world: how many there are.
    """
    if dataset.augment:
        batches = RandomBatches(len(dataset), batch_size, rank, world)
    else:
        batches = dataset.batches(batch_size)[rank::world]
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


# Colours


def color_jitter(
    images: Tensor, brightness: float, contrast: float, saturation: float, hue: float, rank: int = 0, world: int = 1
) -> Tensor:
    """Random brightness, contrast, saturation and hue, drawn for each image of a batch on its own.

    The first three multiply as torchvision's `adjust_*` do, by factors drawn from 1 ± strength; the hue is turned
    about the grey axis by up to ± hue of a full circle. A strength of 0 turns its part off.

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

    def draw(strength: float) -> Tensor:
        of_all = torch.empty(world * len(images), 1, 1, 1, device=images.device)
        return of_all.uniform_(-strength, strength)[rank::world]

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


# Files


class DataError(ValueError):
    """Input that can't be used; the message says what is wrong, in which file, and what to do."""


class Pairs:
    """Image before, image after and mask of each pair of a split, in the order of their names.

    What is known of them stands in arrays, not in an object for each file: the processes that load share these.

    Args:
        folder: holds `{A,B,label}/NAME.{png,jpg,tif}`.
        cache_dir: keeps what was checked and decoded, until a file changes its size or time; None: nothing is kept.
        num_classes: classes of change in the masks.

    Attributes:
        sizes: int64 (pairs, 2), height and width in pixels.

    Raises:
        DataError: a file is missing, can't be read or is no such image, or a pair has more than one size.
    """

    def __init__(self, folder: Path, cache_dir: Path | None, num_classes: int = 1):
        self.folder, self.cache_dir, self.num_classes = folder, cache_dir, num_classes
        self._names = np.array(find_pairs(*(folder / part for part in PARTS)))  # str (pairs, 3)
        files = ((part, name) for names in self._names for part, name in zip(PARTS, names, strict=True))
        stats = (os.stat(f"{folder}/{part}/{name}") for part, name in files)
        stats = np.fromiter(((stat.st_size, stat.st_mtime_ns) for stat in stats), np.dtype((np.int64, 2)))
        self._stats = stats.reshape(-1, len(PARTS), 2)  # bytes, nanoseconds
        self._root = str(folder.resolve())
        if cache_dir is None:
            self.sizes = self._checked()
            return
        try:
            os.makedirs(cache_dir, exist_ok=True)
            self._fill_cache()
        except OSError as error:
            raise DataError(f"CACHE_DIR={cache_dir}: can't be filled ({error}); None does without") from error

    def __len__(self) -> int:
        return len(self._names)

    def paths(self, pair: int) -> tuple[Path, ...]:
        """The three files of a pair."""
        return tuple(self.folder / part / name for part, name in zip(PARTS, self._names[pair], strict=True))

    def load(self, pair: int) -> np.ndarray:
        """uint8 (H, W, 7): three bands before, three after, the mask's classes; of a cached one only what is used."""
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
        files = [file for names, sizes in rows for file in zip(PARTS, names, sizes, strict=True)]
        return _digits("".join(f"{part}/{name} {size}\n" for part, name, size in files).encode())

    def _fill_cache(self) -> None:
        """Check and decode what hasn't been yet, and drop what was made of files as they were before."""
        state = _digits(self._names.tobytes() + self._stats.tobytes() + bytes([self.num_classes]))
        done = self.cache_dir / f"{_digits(self._root.encode())}-{state}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):
            self.sizes = np.load(done)
            return
        self.sizes = self._checked()
        names = [self._cached(pair).name for pair in range(len(self))]
        present = set(os.listdir(self.cache_dir))
        self._each(self._decode_into_cache, [i for i, name in enumerate(names) if name not in present], "decoding")
        with written_whole(done, "wb") as file:
            np.save(file, self.sizes)
        ours = {name.partition("-")[0] for name in (done.name, *names)}
        for name in present.difference(names, [done.name]):
            if name.endswith(".npy") and name.partition("-")[0] in ours:
                (self.cache_dir / name).unlink(missing_ok=True)

    def _checked(self) -> np.ndarray:
        return np.array(self._each(lambda pair: check_headers(self.paths(pair)), range(len(self)), "checking"))

    def _each(self, work: Callable[[int], object], pairs: Sequence[int], verb: str) -> list:
        with ThreadPool(os.cpu_count()) as pool:
            done, bar = pool.imap(work, pairs, chunksize=4), {"leave": False, "disable": None, "delay": 1}
            return list(tqdm(done, f"{verb} {self.folder}", len(pairs), unit="pair", **bar))

    def _cached(self, pair: int) -> Path:
        files = zip(PARTS, self._names[pair].tolist(), strict=True)
        where = _digits("\n".join(f"{self._root}/{part}/{name}" for part, name in files).encode())
        state = _digits(repr([self.num_classes, self._stats[pair].tolist()]).encode())
        return self.cache_dir / f"{where}-{state}.npy"

    def _decode_into_cache(self, pair: int) -> None:
        with written_whole(self._cached(pair), "wb") as file:
            np.save(file, self._decode(pair))

    def _decode(self, pair: int) -> np.ndarray:
        path_a, path_b, path_label = self.paths(pair)
        return np.dstack([read_rgb(path_a), read_rgb(path_b), read_mask(path_label, self.num_classes)])


def find_pairs(*folders: Path) -> list[tuple[str, ...]]:
    """Names of the files that share a stem, one a folder, in the order of the stems; DataError where one is missing."""
    found: list[dict[str, str]] = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; a split holds A, B and label (see data/README.md)")
        files: dict[str, str] = {}
        for entry in os.scandir(folder):
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() not in SUFFIXES or entry.name.startswith(".") or not entry.is_file():
                continue
            if stem in files:
                raise DataError(f"{entry.path}: a second file beside {files[stem]} for one pair; remove one")
            files[stem] = entry.name
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


def check_headers(paths: tuple[Path, ...]) -> tuple[int, int]:
    """The height and width that two images, and the mask if there is a third file, share; DataError if they don't."""
    sizes = []
    for index, path in enumerate(paths):
        with _open(path, mask=index == 2) as image:
            sizes.append(image.size[::-1])
    for path, size in zip(paths[1:], sizes[1:], strict=True):
        if size != sizes[0]:
            raise DataError(
                f"{path}: {size_text(size)} pixels, but {paths[0]} has {size_text(sizes[0])}; a pair needs one size"
            )
    return sizes[0]


def read_rgb(path: Path, mask: bool = False) -> np.ndarray:
    """uint8 (H, W, 3) of an 8-bit image without transparency; of a grey one only if it is a mask.

    Raises:
        DataError: not such an image, damaged, or larger than `MAX_PIXELS`.
    """
    with _open(path, mask) as image:
        try:
            if image.has_transparency_data:
                if image.convert("RGBA").getextrema()[3][0] < 255:
                    raise DataError(f"{path}: partly transparent; flatten it to RGB (or keep bands 1 to 3 alone)")
            return np.array(image.convert("RGB"))
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{path}: damaged or cut short ({error}); replace the file") from error


def read_mask(path: Path, num_classes: int = 1) -> np.ndarray:
    """uint8 (H, W) in {0, …, num_classes} of a mask of these values or, of one class, of 0 and 255.

    Raises:
        DataError: as `read_rgb`, or the mask holds other values.
    """
    rgb = read_rgb(path, mask=True)
    mask = rgb[..., 0]
    grey, binary = (rgb == mask[..., None]).all(), not np.bincount(mask.ravel(), minlength=256)[1:255].any()
    if num_classes == 1 and grey and binary:
        return (mask > 0).astype(np.uint8)
    with _open(path, mask=True) as image:  # a palette may show the classes in any colours
        mask, grey = (np.array(image), True) if image.mode == "P" else (mask, grey)
    if not grey or mask.max() > num_classes:
        values = np.unique(mask)
        shown = ", ".join(map(str, values[:6])) + (", …" if len(values) > 6 else "")
        meant = "0 and 255 (or 0 and 1)" if num_classes == 1 else f"0 to {num_classes}"
        raise DataError(
            f"{path}: a mask holds {meant} alone where NUM_CLASSES={num_classes}, this one {shown}; save it as PNG"
        )
    return mask


def _open(path: Path, mask: bool = False) -> Image.Image:
    """The image with its header read and its kind checked, its pixels not decoded yet."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # beyond twice as many Pillow itself refuses
    try:
        image = Image.open(path)
        complaint = _complaint(image, mask)
    except Exception as error:  # what Pillow's readers meet in a broken file, they raise
        raise DataError(f"{path}: can't be read as an image of one band or three ({error}); replace it") from error
    if complaint:
        image.close()
        raise DataError(f"{path}: {complaint}")
    return image


def _complaint(image: Image.Image, mask: bool) -> str | None:
    """Why an image is of no use, from its header."""
    if image.width * image.height > MAX_PIXELS:
        return f"{image.width} × {image.height} pixels are more than {MAX_PIXELS:,}; cut it"
    exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}  # else it would decode the PNG
    if exif.get(ExifTags.Base.Orientation, 1) != 1:  # viewers turn it, and so does who labels it
        return "turned by its orientation tag; save it upright, without the tag"
    if getattr(image, "n_frames", 1) > 1:
        pages = [image.seek(page) or image.size for page in range(image.n_frames)]
        image.seek(0)
        if pages.count(pages[0]) > 1:  # else the others are its overviews
            return f"{len(pages)} pages; save the one that is meant"
    raw_mode = image.tile[0].args if image.tile else ""
    raw_mode = raw_mode if isinstance(raw_mode, str) else raw_mode[0]
    if ";16" in raw_mode or image.mode[0] in "IF":  # Pillow drops the low byte of 16-bit colour in silence
        return f"more than 8 bits a band ({raw_mode or image.mode}); scale it to 8-bit RGB"
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        return f"colour mode {image.mode}; convert it to 8-bit RGB"
    if image.mode in ("1", "L", "LA") and not mask:
        return "one band, grey; an image needs three, red, green and blue"
    return None


def as_tensor(image: ImageLike) -> Tensor:
    """(3, H, W), uint8 or float, of an image however it is given; DataError where it is something else."""
    if isinstance(image, str | os.PathLike):
        image = read_rgb(Path(image))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
        image = torch.from_numpy(np.require(image, requirements="CW")).permute(2, 0, 1)
    kind = f"{image.dtype} {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
    if not torch.is_tensor(image) or not re.match(r"torch\.(uint8|float\d*) \(3, \d+, \d+\)", kind):
        raise DataError(f"an image is a file, a uint8 array (H, W, 3) or a uint8 or float tensor (3, H, W), not {kind}")
    return image if image.dtype == torch.uint8 else image.float()


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
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two runs draw into images/
    try:
        with open(part, mode, newline=None if "b" in mode else "") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path}: can't be written ({error.strerror or error}); what was there is kept") from error
    finally:
        part.unlink(missing_ok=True)
