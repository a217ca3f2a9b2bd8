"""LEVIR-CD pairs, from files to batches: found, checked, decoded once, cropped and flipped; and colour jitter."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import math
import os
import re
import shlex
import signal
import sys
import unicodedata
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

if TYPE_CHECKING:
    from rasterio import DatasetReader

FOLDERS = ("A", "B", "label")  # of a split: images before, images after, masks
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
SYSTEM_FOLDERS = re.compile(
    r"\..*|@eaDir|#recycle|#snapshot|@Recycle|@Recently-Snapshot|\$RECYCLE\.BIN|System Volume Information|__MACOSX"
)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GEOTAGS = {33550, 33922, 34264, 34735, 42113, 50844}  # of a TIFF that has a place (OGC 19-008r4), no-data value or RPC
PILLOW_BANDS = {
    "1": 1, "L": 1, "LA": 1, "I": 1, "I;16": 1, "I;16B": 1, "F": 1,
    "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "RGBX": 4,
}  # fmt: skip
NEAR = 32  # grey levels from 0 or 255 that an edge or JPEG may take a value of a mask
IGNORED = 255  # in a label: this pixel is neither trained on nor scored
ImageLike = Tensor | np.ndarray | Image.Image | str | os.PathLike
MAX_PIXELS = 400_000_000  # an image may hold, 20,000 × 20,000: a small file of a stranger may unpack to more
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is lower, and only warns


class DataError(ValueError):
    """Input that can't be used; the message says what is wrong, in which file, and what to do."""


class LEVIRCD(Dataset):
    """Pairs of co-registered images and the mask of what changed (LEVIR-CD: Chen and Shi 2020, doi:10.3390/rs12101662).

    An item is `(image_a, image_b, label)`: uint8 (3, H, W), uint8 (3, H, W) and uint8 (1, H, W). The label is in
    {0, …, num_classes}, or 255 where a pixel is to be ignored or an image has no data.

    Items are whole images or, in reading order, the tiles of each image, smaller ones at its right and bottom edge.
    With augmentation an item is a random crop near such a tile, randomly rotated by quarter turns and mirrored.

    Args:
        root: folder that holds `split/{A,B,label}/NAME.{png,jpg,tif,bmp}`. The three files of a pair share a stem. They
            may lie in subfolders of A, B and label, the same in each.
        split: "train", "val", "test" or any other folder of `root`. Where there is no val, a tenth of the pairs of
            train, chosen by their names, are val instead.
        crop_size: side of a crop or tile in pixels; None for whole images.
        augment: random crops, rotated and mirrored, instead of tiles; colours change later, in `color_jitter`.
        cache_dir: folder for decoded pairs, 7 bytes a pixel, shared by all processes; None decodes at each access.
        num_classes: classes of change; masks hold 0 and 255, or 0 to `num_classes`.
        ignore: mask value of pixels to ignore; None for no such value.
        folders: names of the three folders of a split.
        swap_dates: probability that the dates of a random crop are exchanged, 0..1.

    Raises:
        DataError: files are missing or unreadable, differ in size or are smaller than the crop, or a mask isn't one.
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
        self.split, self.crop_size, self.augment, self.swap_dates = split, crop_size, augment, swap_dates
        self.num_classes, self.ignore = num_classes, ignore
        self.files = find_split(Path(root).expanduser(), split, folders)
        self._cached = None if cache_dir is None else [self._cache_file(cache_dir, pair) for pair in self.files]
        self._remarks: dict[str, set[Path]] = {}  # how odd masks were read, and which
        self.sizes = self._decode_all()  # (height, width) of each pair
        if augment:
            self._check_crop()
        self._windows = [
            (pair, rows, columns)
            for pair, (height, width) in enumerate(self.sizes)
            for rows in self._spans(height)
            for columns in self._spans(width)
        ]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """The item at an index; with augmentation `(index, seed)` always gives the same crop."""
        index, seed = key if isinstance(key, tuple) else (key, int(torch.randint(2**31, ())))
        pair, rows, columns = self._windows[index]
        array = self._load(pair)
        if self.augment:
            array = self._random_crop(array, rows, columns, np.random.default_rng(seed))
        else:
            array = array[rows, columns]
        return torch.from_numpy(array.transpose(2, 0, 1).copy()).split([3, 3, 1])  # the only copy

    def name(self, index: int) -> str:
        """A readable name of an item: the stem of its files and, for a tile, its row and column in pixels."""
        pair, rows, columns = self._windows[index]
        stem = self.files[pair][0].stem
        return f"{stem} [{rows.start}, {columns.start}]" if self.crop_size else stem

    def fingerprint(self) -> str:
        """12 hexadecimal digits that change when a file is added, removed or renamed, or its size in bytes changes."""
        lines = [f"{file.parent.name}/{file.name} {file.stat().st_size}\n" for files in self.files for file in files]
        return short_hash("".join(lines))

    @functools.cached_property
    def has_change(self) -> bool:
        """Whether any mask labels a pixel as changed; DataError where all pixels are ignored."""
        has_valid = False
        for pair in range(len(self.files)):
            label = self._load(pair)[..., 6]
            valid = label[label != IGNORED]
            if valid.any():
                return True
            has_valid |= valid.size > 0
        if not has_valid:
            raise DataError(f"{self.files[0][2].parent}: no mask has a pixel to score; all are ignored")
        return False

    def batches(self, pixels: int) -> list[list[int]]:
        """All indices in lists of items of one size, each of at most so many pixels or of one item, for evaluation."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, (_, rows, columns) in enumerate(self._windows):
            by_size.setdefault((rows.stop - rows.start, columns.stop - columns.start), []).append(index)
        batches = []
        for (height, width), indices in by_size.items():
            count = max(1, pixels // (height * width))
            batches += [indices[i : i + count] for i in range(0, len(indices), count)]
        return batches

    def _spans(self, length: int) -> list[slice]:
        """The tiles along a side: the last one smaller or, of random crops, as many as fit, of one size."""
        size = self.crop_size or length
        if self.augment:
            size = length // (length // size)
            return [slice(start, start + size) for start in range(0, length - size + 1, size)]
        return [slice(start, min(start + size, length)) for start in range(0, length, size)]

    def _check_crop(self) -> None:
        """Check that a random crop fits into each image and that crops can form a batch."""
        for (path, *_), size in zip(self.files, self.sizes, strict=True):
            if self.crop_size and min(size) < self.crop_size:
                raise DataError(f"{path}: {size_text(size)} pixels, less than CROP_SIZE={self.crop_size}: lower it")
            if not self.crop_size and size != self.sizes[0]:
                raise DataError(
                    f"{path}: {size_text(size)} pixels, but {self.files[0][0]} has {size_text(self.sizes[0])}: whole "
                    "images of different sizes can't form a batch; set CROP_SIZE"
                )

    def _random_crop(self, array: np.ndarray, rows: slice, columns: slice, rng: np.random.Generator) -> np.ndarray:
        """A crop centred in the tile, shifted to lie inside the image, then randomly turned, mirrored and swapped.

        Shifting gives the border and the corners of an image their share, which crops placed uniformly in it hardly
        ever hold. All seven bands move together, and the mask isn't interpolated.
        """
        window = []
        for span, length in zip((rows, columns), array.shape[:2], strict=True):
            size = self.crop_size or length
            start = min(max(rng.integers(span.start, span.stop) - size // 2, 0), length - size)
            window.append(slice(start, start + size))
        crop = array[tuple(window)]
        # A quarter turn of an oblong image would not fit into a batch with the others.
        crop = np.rot90(crop, rng.integers(4) if crop.shape[0] == crop.shape[1] else 2 * rng.integers(2))
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        if rng.random() < self.swap_dates:
            crop = crop[..., [3, 4, 5, 0, 1, 2, 6]]
        return crop

    # Decoded pairs

    def _decode_all(self) -> list[tuple[int, int]]:
        """Decode the pairs that aren't cached yet, which checks them, and return the heights and widths of all."""
        pairs = range(len(self.files))
        with ThreadPool(usable_cores()) as pool:
            sizes = pool.imap(lambda pair: self._load(pair).shape[:2], pairs)
            sizes = list(progress(sizes, desc=f"decoding {self.split}", total=len(pairs), unit="pair", delay=1))
        for remark, masks in self._remarks.items():
            print_once(f"{self.split}: {len(masks)} of {len(pairs)} masks {remark} (such as {min(masks)})")
        return sizes

    def _load(self, pair: int) -> np.ndarray:
        """uint8 (H, W, 7): three bands before, three after, the label; from the cache only as far as it is used."""
        if self._cached is None:
            return self._decode(pair)
        path = self._cached[pair]
        with contextlib.suppress(OSError, ValueError, EOFError):  # not decoded yet, deleted or damaged
            return np.load(path, mmap_mode="r")
        array = self._decode(pair)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path, "wb") as file:
                np.save(file, array)
        except OSError as error:
            raise DataError(f"CACHE_DIR: {error}; CACHE_DIR=None works without it") from error
        return array

    def _decode(self, pair: int) -> np.ndarray:
        """The pair as `_load` gives it."""
        *images, mask = self.files[pair]
        (image_a, void_a), (image_b, void_b) = map(read_image, images)
        label, remark = read_mask(mask, self.num_classes, self.ignore)
        if remark:
            self._remarks.setdefault(remark, set()).add(mask)
        for path, array in ((images[1], image_b), (mask, label)):
            if array.shape[:2] != image_a.shape[:2]:
                sizes = size_text(array.shape), size_text(image_a.shape)
                raise DataError(f"{path}: {sizes[0]} pixels, but {images[0]} has {sizes[1]}; a pair needs one size")
        for void in (void_a, void_b):
            if void is not None:
                label[void] = IGNORED
        return np.dstack([image_a, image_b, label])

    def _cache_file(self, cache_dir: str | os.PathLike, files: Sequence[Path]) -> Path:
        """The name of a decoded pair, another one as soon as a file or the way to read it changes."""
        # GDAL reads what lies beside an image, too.
        sidecars = [Path(f"{file}{suffix}") for file in files for suffix in (".msk", ".aux.xml")]
        stats = [file.stat() for file in (*files, *sidecars) if file.exists()]
        # The change time too: an archive may give a corrected mask the old size and modification time.
        versions = [(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]
        key = self.num_classes, self.ignore, [str(file.resolve()) for file in files], versions
        return Path(cache_dir).expanduser() / f"{short_hash(repr(key))}.npy"


# Batches


class RandomBatches(Sampler):
    """Full batches of indices in random order, each with the seed of its crop; all of it follows from torch's seed.

    With several processes, each gets its share of every batch, so that a step doesn't depend on their number.

    Raises:
        DataError: several processes have no full batch to share.
    """

    def __init__(self, length: int, batch_size: int):
        if length < batch_size and world() > 1:
            raise DataError(f"{length} crops don't fill a batch of {batch_size} to share: lower BATCH_SIZE")
        self.length, self.batch_size = length, batch_size

    def __len__(self) -> int:
        return max(1, self.length // self.batch_size)  # one that isn't full, if there is no other

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        drawn = torch.stack([torch.randperm(self.length), torch.randint(2**31, (self.length,))], dim=1)
        for batch in drawn[: len(self) * self.batch_size].split(self.batch_size):
            yield [tuple(draw) for draw in batch[rank() :: world()].tolist()]


def make_loader(
    dataset: LEVIRCD, batches: Sampler | Sequence[list[int]], num_workers: int | None, on_gpu: bool
) -> DataLoader:
    """A loader of a data set's batches.

    Args:
        dataset: where the items come from.
        batches: the indices of each batch: `RandomBatches`, or some of `dataset.batches()`.
        num_workers: processes that load; None for up to eight on a GPU, by the cores, and 0 otherwise.
        on_gpu: whether the batches go to a GPU.
    """
    if num_workers is None:
        cores = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        num_workers = max(1, min(8, cores)) if on_gpu else 0
    # The separate generator keeps torch's own from depending on the number of workers.
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=num_workers, persistent_workers=num_workers > 0,
        worker_init_fn=ignore_signals, pin_memory=on_gpu, generator=torch.Generator(),
    )  # fmt: skip


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def ignore_signals(_: int) -> None:
    """Leave Ctrl-C, which reaches a worker too, to the main process; end without a complaint when asked to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: os._exit(0))


def color_jitter(images: Tensor, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """Random brightness, contrast, saturation and hue, drawn for each image.

    The first three multiply as in torchvision's `adjust_*`, by factors drawn from 1 ± strength. Hue rotates colours
    about the grey axis. All four are linear, so they are one matrix for each image, and values outside of 0..1 are
    clipped once, at the end. With several processes each draws for all their images and uses its share, so that the
    colours don't depend on their number.

    Args:
        images: (N, 3, H, W), uint8, on any device.
        brightness: strength, 0..1; 0 for off.
        contrast: likewise.
        saturation: likewise.
        hue: largest rotation as a share of a full turn, 0..1.

    Returns:
        float32 (N, 3, H, W) in 0..1.
    """

    def draw(middle: float, strength: float) -> Tensor:
        values = torch.empty(world() * len(images), 1, 1, device=images.device)
        return values.uniform_(middle - strength, middle + strength)[rank() :: world()]

    pixels = images.flatten(2) / 255  # (N, 3, H·W), float32
    luma = torch.tensor([[0.2989, 0.587, 0.114]])  # of red, green, blue: ITU-R BT.601, with torchvision's digits
    luma = luma.to(images.device, non_blocking=True)  # (1, 3); a blocking copy waits for the last step
    bright, stretch, saturated = (draw(1, strength) for strength in (brightness, contrast, saturation))
    channels = torch.arange(3, device=images.device)
    thirds = (channels - channels[:, None]) / 3  # a third of a turn takes each colour to the next
    rotate = (1 + 2 * torch.cos(2 * math.pi * (draw(0, hue) + thirds))) / 3  # (N, 3, 3)
    matrix = rotate @ torch.lerp(luma.expand(3, 3), torch.eye(3, device=images.device), saturated)  # (N, 3, 3)
    mean_grey = bright * (luma @ pixels.mean(2, keepdim=True))  # (N, 1, 1), about which contrast stretches
    offset = (1 - stretch) * mean_grey * matrix.sum(2, keepdim=True)  # (N, 3, 1)
    return torch.baddbmm(offset, stretch * bright * matrix, pixels).clamp_(0, 1).view(images.shape)


# Files


def find_split(root: Path, split: str, folders: Sequence[str]) -> list[tuple[Path, ...]]:
    """The files of each pair of a split, in the order of their names; where there is no val, a tenth of train is."""
    holds_out = split in ("train", "val") and not (root / "val").is_dir() and (root / "train").is_dir()
    paths = [root / ("train" if holds_out else split) / folder for folder in folders]
    pairs = [tuple(path / name for path, name in zip(paths, names, strict=True)) for names in find_pairs(*paths)]
    if not holds_out or (len(pairs) == 1 and split == "train"):
        return pairs
    if len(pairs) == 1:
        raise DataError(f"{root / 'val'}: no such folder, and train holds only one pair: add val")
    by_name = sorted(pairs, key=lambda files: short_hash(str(files[0].relative_to(paths[0]))))
    held_out = set(by_name[: math.ceil(len(pairs) / 10)])
    print_once(f"{root}: no val in it; {len(held_out)} of {len(pairs)} pairs of train, by their names, are val instead")
    return [files for files in pairs if (files in held_out) == (split == "val")]


def find_pairs(*folders: Path, skip: Path | None = None) -> list[tuple[str, ...]]:
    """Match the images of two or three folders by their stems (in Unicode's NFC), which include subfolders.

    Args:
        folders: each holds one file of every pair.
        skip: a folder below these that isn't searched.

    Returns:
        For each pair, sorted by stem, its paths below the folders.

    Raises:
        DataError: a folder or a file is missing, or a folder holds a stem twice.
    """
    found = [_images_by_stem(folder, skip) for folder in folders]
    stems = sorted(set().union(*found))
    if not stems:
        raise DataError(f"{' and '.join(map(str, folders))}: no images ({', '.join(sorted(SUFFIXES))})")
    for stem in stems:
        for folder, files in zip(folders, found, strict=True):
            if stem not in files:
                other, others = next(each for each in zip(folders, found, strict=True) if stem in each[1])
                hint = _renaming(folder, files, others) or "add it or remove this one"
                raise DataError(f"{other / others[stem]}: no file of that name in {folder}; {hint}")
    return [tuple(files[stem] for files in found) for stem in stems]


def folder_names(text: str) -> list[str]:
    """Names separated by spaces or, where they hold spaces, by commas."""
    return [name.strip() for name in text.split("," if "," in text else None)]


def images_in(folder: Path, skip: Path | None = None) -> Iterator[str]:
    """Paths, below the folder, of the images in it and its subfolders.

    Passed over are hidden and system folders, `skip`, and folders of masks, which hold the summary.csv of visualize.py.

    Raises:
        DataError: a folder can't be read, or an image is a link that leads nowhere.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise DataError(f"{error.filename}: can't be read ({error.strerror})")

    for root, subfolders, names in os.walk(folder, onerror=fail, followlinks=True):
        visible = [Path(root, name) for name in subfolders if not SYSTEM_FOLDERS.fullmatch(name)]
        visible = [path for path in visible if not (path / "summary.csv").exists()]
        subfolders[:] = [path.name for path in visible if not skip or path.resolve() != skip.resolve()]
        for path in (Path(root, name) for name in names if name[0] != "."):
            if path.suffix.lower() in SUFFIXES:
                if not path.exists():
                    raise DataError(f"{path}: a link that leads nowhere; fetch its file, or remove the link")
                yield path.relative_to(folder).as_posix()


def _images_by_stem(folder: Path, skip: Path | None) -> dict[str, str]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; see data/README.md, and FOLDERS")
    files: dict[str, str] = {}
    for name in images_in(folder, skip):
        stem = unicodedata.normalize("NFC", os.path.splitext(name)[0])
        if stem in files:
            raise DataError(f"{folder / name}: a second file beside {files[stem]} for one pair; remove one")
        files[stem] = name
    return files


def _renaming(folder: Path, stems: Iterable[str], wanted: Iterable[str]) -> str | None:
    """The shell command that renames a folder's files, if all stems differ from the wanted ones by the same ending."""
    endings = set()
    for stem, other in itertools.zip_longest(sorted(stems), sorted(wanted), fillvalue=""):
        match = re.fullmatch(r"(.+)(.*)\n\1(.*)", f"{stem}\n{other}")  # their common beginning, and what differs
        endings.add(match and match.groups()[1:])
    if len(endings) > 1 or None in endings:
        return None
    old, new = map(shlex.quote, endings.pop())
    loop = f'for f in *{old}.*; do mv "$f" "${{f%{old}.*}}"{new}".${{f##*.}}"; done'
    return f"rename: cd {shlex.quote(str(folder))}; {loop}"


def import_rasterio() -> ModuleType | None:
    """Rasterio, which is optional: None where it isn't installed."""
    os.environ.setdefault("GDAL_CACHEMAX", "64")  # MB; by default GDAL keeps what was decoded in a 20th of the memory
    try:
        import rasterio
    except ImportError:
        return None
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # what it logs it also raises
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    return rasterio


def open_raster(path: Path) -> DatasetReader:
    """A file opened by rasterio; DataError where that isn't installed."""
    rasterio = import_rasterio()
    if rasterio is None:
        raise DataError(f"{path}: only rasterio reads such files: pip install rasterio")
    is_utf8 = str(path) == os.fsencode(path).decode(errors="replace")  # the only names that rasterio takes
    return rasterio.open(path if is_utf8 else BytesIO(path.read_bytes()))


def _open(path: Path) -> Image.Image | DatasetReader:
    with open(path, "rb") as file:
        signature = file.read(8)
    if os.path.isfile(f"{path}.msk"):  # where GDAL keeps the void pixels of a file of any format
        return open_raster(path)
    if signature == PNG_SIGNATURE:
        return Image.open(_without_metadata(path))
    if signature[:2] not in (b"II", b"MM"):
        return Image.open(path)
    if import_rasterio() is None:
        with contextlib.suppress(Exception):  # Pillow doesn't know all kinds of TIFF
            image = Image.open(path)
            if image.n_frames == 1 and not GEOTAGS & set(image.tag_v2):
                return image
    return open_raster(path)


def _without_metadata(path: Path) -> BytesIO:
    """The chunks of a PNG that make its picture; the others may be broken, or larger than Pillow takes."""
    kept = BytesIO()
    with open(path, "rb") as file:
        kept.write(file.read(len(PNG_SIGNATURE)))
        while len(start := file.read(8)) == 8:
            chunk = start + file.read(int.from_bytes(start[:4]) + 4)  # length, name, content, checksum
            if start[4:] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
                kept.write(chunk)
    kept.seek(0)
    return kept


def _check_header(path: Path, image: Image.Image | DatasetReader, mask: bool) -> None:
    """Raise a DataError where an image is of no use, as far as its header tells."""
    if image.width * image.height > MAX_PIXELS:
        size = size_text((image.height, image.width))
        raise DataError(f"{path}: {size} pixels are more than {MAX_PIXELS:,}; cut it, or raise --max-pixels")
    orientation = 1
    with contextlib.suppress(Exception), Image.open(path) as header:  # other metadata don't matter
        if header.format == "TIFF" or "exif" in header.info:  # Pillow would decode a whole PNG to look for it
            orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation != 1:  # viewers turn it, and so do those who label it
        raise DataError(f"{path}: turned by its orientation tag; save it upright, without the tag")
    if isinstance(image, Image.Image):
        bands = PILLOW_BANDS.get(image.mode, 0)
        is_deep = image.mode[0] in "IF" or ";16" in str(image.tile)  # of 16-bit colours Pillow drops the lower bytes
    else:
        bands = 3 if _palette(image) is not None else sum(band.name != "alpha" for band in image.colorinterp)
        is_deep = set(image.dtypes) != {"uint8"}
        pages = [open_raster(page).shape for page in image.subdatasets].count(image.shape)
        if pages > 1:
            raise DataError(f"{path}: {pages} pages; save the one that is meant")
    wanted = "one band of 8 bits" if mask else "8-bit RGB"
    if is_deep and not (mask and bands == 1):
        raise DataError(f"{path}: more than 8 bits a band; scale it to {wanted}: gdal_translate -ot Byte -scale")
    if bands not in (1, 3, 4) or (bands == 1 and not mask):
        raise DataError(f"{path}: not an image of red, green and blue; convert it to {wanted}")


def read_image(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """An 8-bit image, and where it is void: transparent, masked, or without data in all of its bands.

    Returns:
        uint8 (H, W, 3); bool (H, W), or None where nothing is void.

    Raises:
        DataError: not such an image, damaged, larger than `MAX_PIXELS`, partly transparent, or void all over.
    """
    bands, palette, opacity, _ = _decode(Path(path))
    rgb = bands[..., :3] if palette is None else palette[bands[..., 0]]
    partly = 0 if opacity is None else np.count_nonzero((opacity > 0) & (opacity < 255))
    if bands.shape[-1] == 4 or partly > 0.05 * len(rgb) * len(rgb[0]):  # GDAL calls any fourth band alpha
        print_once(f"{Path(path).parent}: of four bands the first three are read, as red, green and blue")
        return rgb, None
    if partly:
        raise DataError(f"{path}: partly transparent: a pixel is void or it isn't; flatten it to RGB")
    if opacity is None or opacity.all():
        return rgb, None
    if not opacity.any():
        raise DataError(f"{path}: void all over: transparent, masked or of its no-data value")
    return rgb, opacity == 0


def read_mask(path: Path, num_classes: int = 1, ignore: int | None = None) -> tuple[np.ndarray, str]:
    """A mask as classes.

    In any form it becomes one band: the index of a palette (with one class: whether it isn't black), else the highest
    of its colours. Values up to `num_classes` are classes; else, with one class, those above 127 are change, after more
    than 8 bits were scaled. Pixels without data are ignored.

    Args:
        path: the mask.
        num_classes: classes of change.
        ignore: a value that marks pixels to ignore.

    Returns:
        uint8 (H, W) in {0, …, num_classes} or `IGNORED`; how an odd mask was read, "" for a usual one.

    Raises:
        DataError: damaged, a picture, or to be read in two ways, as 0, 1 and 255 can be.
    """
    bands, palette, opacity, top = _decode(Path(path), mask=True)
    values, remark = _one_band(path, bands, palette, num_classes)
    remarks = [remark]
    void = np.isnan(values)
    if opacity is not None:
        void |= opacity == 0
    if void.any():
        remarks.append("have pixels without data, which are ignored")
    numbers = values[~void]
    least, most = numbers.min(initial=0), numbers.max(initial=0)
    if least < 0 or not np.isfinite(most):
        raise DataError(f"{path}: a mask holds no negative or infinite values, this one {least + 0:g} to {most + 0:g}")
    if most > 255 or (numbers % 1).any():
        values = np.ceil(values / most * 255)  # only 0 becomes 0
        remarks.append("have more than 8 bits: their highest value is change")
    elif num_classes == 1 < most == top:
        values = values * (255 // top)
    values = np.where(void, 0, values).astype(np.uint8)
    ignored = void if ignore is None else void | (values == ignore)
    counts = np.bincount(values[~ignored], minlength=256)
    second, highest = [0, 0, *np.flatnonzero(counts)][-2:]
    # Edges and JPEG leave other values, too: few that are far from 0 and 255, and some near 255.
    is_binary = second == 0 or (second > 127 and counts[NEAR : 256 - NEAR].sum() < 0.05 * values.size)
    if highest > num_classes and not (num_classes == 1 and highest > 127 and is_binary):
        meant = "0 and 255 (or 0 and 1)" if num_classes == 1 else f"0 to {num_classes}"
        shown = ", ".join(f"{value:g}" for value in np.unique(bands.max(-1)[~ignored])[:6])
        advice = "save it as PNG, with these values alone"
        if highest == 255 and second < 128:
            advice = "give IGNORE=255 if 255 is not to be looked at, or make the other values 0 if 255 is change"
        raise DataError(f"{path}: a mask holds {meant} where NUM_CLASSES={num_classes}, this one {shown}; {advice}")
    if highest > num_classes:
        values = (values > 127).astype(np.uint8)
        if counts[1:255].any():
            remarks.append("hold other values than 0 and 255: above 127 is change")
    values[ignored] = IGNORED
    return values, "; ".join(filter(None, remarks))


def _one_band(path: Path, bands: np.ndarray, palette: np.ndarray | None, num_classes: int) -> tuple[np.ndarray, str]:
    """The values of a mask (H, W), and how colours were read; DataError where it is a picture."""
    if palette is not None and num_classes == 1 and not palette[np.unique(bands)].any(-1).all():  # black is used
        bands = palette[bands[..., 0]]
        if 1 < bands.max() < 128:  # a dark colour
            bands = bands * (255 // bands.max())
    values = bands.max(-1)
    if bands.shape[-1] == 1 or (bands == bands[..., :1]).all():
        return values, ""
    if num_classes > 1:
        raise DataError(f"{path}: coloured; the classes of a mask are numbers, as grey values or of a palette")
    bright = bands[values > (NEAR if palette is not None else int(values.max()) - NEAR)]
    hues = np.unique(bright > values.max() / 2, axis=0)
    if len(hues) > 1 or values.all():
        raise DataError(f"{path}: a mask holds 0 and 255, or one colour on black; this one is a picture")
    return values, "" if hues.all() else "are coloured: what isn't black is change"


def _decode(path: Path, mask: bool = False) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, int]:
    """What a file holds, uninterpreted; by rasterio for a TIFF, else by Pillow.

    Returns:
        The bands without alpha, (H, W, C); the colours of a palette, uint8 (n, 3), or None; the opacity, uint8 (H, W),
        0 where void, or None; the highest value that fits into its bits if these are fewer than 8, else 255.
    """
    try:
        with _open(path) as image:
            _check_header(path, image, mask)
            decode = _decode_pillow if isinstance(image, Image.Image) else _decode_raster
            bands, palette, opacity, top, has_alpha = decode(image, path, mask)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a decoder raises what it meets in a broken file
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "no image, or damaged" if is_unknown else " ".join(str(error.__cause__ or error).split())
        advice = "replace it" if import_rasterio() else "replace it, or try with rasterio: pip install rasterio"
        raise DataError(f"{path}: can't be decoded ({reason}); {advice}") from error
    if mask and has_alpha and opacity.min() < 255:
        raise DataError(f"{path}: partly transparent; a mask is opaque")
    return bands, palette, opacity, top


def _decode_pillow(image: Image.Image, *_: object) -> tuple:
    """As `_decode`; and whether the opacity is of an alpha band or a transparent colour."""
    bands, palette, opacity, top = np.atleast_3d(np.asarray(image)), None, None, 255
    if image.mode in ("LA", "PA", "RGBA"):
        bands = bands[..., :-1]
    if image.has_transparency_data:
        opacity = np.asarray(image.convert("RGBA").getchannel("A"))
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
    for bits, highest in ((2, 3), (4, 15)):
        if f"L;{bits}" in str(image.tile):  # Pillow spreads them over 0 to 255
            bands, top = bands // (255 // highest), highest
    return bands, palette, opacity, top, opacity is not None


def _decode_raster(image: DatasetReader, path: Path, mask: bool) -> tuple:
    """As `_decode_pillow`."""
    colours = [number for number, band in enumerate(image.colorinterp, 1) if band.name != "alpha"]
    bands, palette, opacity = np.moveaxis(image.read(colours), 0, -1), _palette(image), None
    top = 2 ** int(image.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8)) - 1
    if top == 1:  # GDAL gives a palette of black and white to these
        bands, palette = palette[bands[..., 0]] // 255, None
    if mask and image.nodata == 0:
        print_once(f"{path.parent}: 0 is unchanged in the masks, though it is their no-data value")
    elif image.mask_flag_enums[0][0].name != "all_valid":
        opacity = image.read_masks(colours).max(0)
    return bands, palette, opacity, top, opacity is not None and len(colours) < image.count


def _palette(image: DatasetReader) -> np.ndarray | None:
    """The colours of a raster with a palette, uint8 (n, 3)."""
    if image.colorinterp[0].name != "palette":
        return None
    return np.array(list(image.colormap(1).values()), np.uint8)[:, :3]


def as_tensor(image: ImageLike) -> Tensor:
    """An image in any of its forms as (3, H, W), uint8 or float32 in 0..1; DataError for anything else."""
    if isinstance(image, str | os.PathLike):
        image = read_image(Path(image).expanduser())[0]
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
        is_shared = image.flags.writeable and min(image.strides) > 0  # torch takes no others
        image = torch.from_numpy(image if is_shared else image.copy()).permute(2, 0, 1)
    kind = f"{image.dtype} {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
    if not torch.is_tensor(image) or not re.match(r"torch\.(uint8|float\d*) \(3, \d+, \d+\)", kind):
        forms = "a file, a PIL image, a uint8 array (H, W, 3) or a uint8 or float tensor (3, H, W)"
        raise DataError(f"an image is {forms}, not {kind}")
    if image.dtype == torch.uint8:
        return image
    if not -1e-3 <= image.min() <= image.max() <= 1.001:
        raise DataError(f"a float image is in 0..1, not {image.min():.3g} to {image.max():.3g}: divide it by 255")
    return image.float()


_printed: set[str] = set()


def rank() -> int:
    """The number of this process among those of torchrun; 0 logs and saves."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def announce(line: str) -> None:
    """Print a line, in the first process only."""
    if rank() == 0:
        print(line, flush=True)


def print_once(line: str) -> None:
    """Announce a line, but not a second time."""
    if line not in _printed:
        announce(line)
    _printed.add(line)


def progress(iterable: Iterable | None = None, **options: object) -> tqdm:
    """A progress bar in the terminal of the first process, elsewhere nothing."""
    is_hidden = rank() > 0 or sys.stderr is None or not sys.stderr.isatty()
    return tqdm(iterable, leave=False, disable=is_hidden, **options)


def size_text(size: tuple[int, int]) -> str:
    """Height and width as people write them: width × height."""
    return f"{size[1]} × {size[0]}"


def short_hash(text: str) -> str:
    """12 hexadecimal digits of a text."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file to write, which replaces the one at `path` when all of it is on the disk, and never after an error.

    Raises:
        OSError: it can't be written; the message names the file.
    """
    part = path.with_name(f".{uuid.uuid4().hex}.part")  # unique, also among machines that share a disk
    text = {} if "b" in mode else {"newline": "", "encoding": "utf-8"}
    try:
        with open(part, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path}: can't be written ({error.strerror or error})") from error
    finally:
        part.unlink(missing_ok=True)
