"""LEVIR-CD pairs from files to tensors: pairing, decoding, cropping, augmenting, complaints about bad input."""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

FOLDERS = ("A", "B", "label")
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
MAX_PIXELS = 400_000_000  # an image may hold, 20,000 × 20,000: a small file of a stranger may unpack to more


class DataError(ValueError):
    """Input that can't be used; the message says what is wrong, in which file, and what to do."""


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
                    f"{paths[0]}: {_by(size)} pixels are less than the crop of {crop_size}: lower CROP_SIZE"
                )
            if augment and not crop_size and size != sizes[0]:
                raise DataError(
                    f"{paths[0]}: {_by(size)} pixels, but {self.pairs[0][0]} has {_by(sizes[0])}: set a CROP_SIZE"
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
        array = np.load(self._cached[pair], mmap_mode="r") if self._cached else _decode(self.pairs[pair])
        array = self._random_crop(array, np.random.default_rng(seed)) if self.augment else array[rows, columns]
        array = np.ascontiguousarray(array.transpose(2, 0, 1))  # (7, H, W): the one copy
        return tuple(torch.from_numpy(array).split([3, 3, 1]))

    def name(self, index: int) -> str:
        """What a person calls item `index`: the stem of its files and, for a tile, its row and column in pixels."""
        pair, rows, columns = self.tiles[index]
        stem = self.pairs[pair][0].stem
        return f"{stem} [{rows.start}, {columns.start}]" if self.crop_size else stem

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


def find_pairs(*folders: Path) -> list[tuple[Path, ...]]:
    """The files of several folders that share a stem, in the order of their stems; DataError where one is missing."""
    found: list[dict[str, Path]] = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; a split holds A, B and label (see data/README.md)")
        files: dict[str, Path] = {}
        for entry in os.scandir(folder):
            path = Path(entry.path)
            if path.suffix.lower() not in SUFFIXES or entry.name.startswith(".") or not entry.is_file():
                continue
            if path.stem in files:
                raise DataError(f"{path}: a second file beside {files[path.stem].name} for one pair; remove one")
            files[path.stem] = path
        found.append(files)
    stems = sorted(set().union(*found))
    if not stems:
        raise DataError(f"{' and '.join(map(str, folders))}: no images ({', '.join(sorted(SUFFIXES))})")
    for stem in stems:
        for folder, files in zip(folders, found, strict=True):
            if stem not in files:
                there = next(other[stem] for other in found if stem in other)
                raise DataError(f"{there}: no file of that name in {folder}; add it or remove this one")
    return [tuple(files[stem] for files in found) for stem in stems]


def _open(path: Path, mask: bool = False) -> Image.Image:
    """The image with its header read and its kind checked, its pixels not decoded yet."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # beyond twice as many Pillow itself refuses
    try:
        image = Image.open(path)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: can't be read as an image of one band or three ({error}); replace it") from error
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{path}: {image.width} × {image.height} pixels are more than MAX_PIXELS of dataset.py; cut it")
    raw_mode = image.tile[0].args if image.tile else ""
    raw_mode = raw_mode if isinstance(raw_mode, str) else raw_mode[0]
    if ";16" in raw_mode or image.mode[0] in "IF":  # Pillow drops the low byte of 16-bit colour in silence
        raise DataError(f"{path}: more than 8 bits a band ({raw_mode or image.mode}); scale it to 8-bit RGB")
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise DataError(f"{path}: colour mode {image.mode}; convert it to 8-bit RGB")
    if image.mode in ("1", "L", "LA") and not mask:
        raise DataError(f"{path}: one band, grey; an image needs three, red, green and blue")
    return image


def check_headers(paths: tuple[Path, ...]) -> tuple[int, int]:
    """The height and width that two images, and the mask if there is a third file, share; DataError if they don't."""
    sizes = []
    for index, path in enumerate(paths):
        with _open(path, mask=index == 2) as image:
            sizes.append(image.size[::-1])
    for path, size in zip(paths[1:], sizes[1:], strict=True):
        if size != sizes[0]:
            raise DataError(f"{path}: {_by(size)} pixels, but {paths[0]} has {_by(sizes[0])}; a pair needs one size")
    return sizes[0]


def _decode(paths: tuple[Path, Path, Path]) -> np.ndarray:
    """uint8 (H, W, 7): three bands before, three after, and the mask in {0, 1}."""
    return np.dstack([read_rgb(paths[0]), read_rgb(paths[1]), _read_mask(paths[2])])


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
        except (OSError, ValueError, SyntaxError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: damaged or cut short ({error}); replace the file") from error


def _read_mask(path: Path) -> np.ndarray:
    """uint8 (H, W) in {0, 1} of a mask in {0, 1} or {0, 255}, in any mode that shows it."""
    rgb = read_rgb(path, mask=True)
    mask = rgb[..., 0]
    values = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    if not (np.isin(values, (0, 255)).all() or np.isin(values, (0, 1)).all()) or (rgb != mask[..., None]).any():
        with _open(path, mask=True) as image:  # a palette may show the classes 0 and 1 in any two colours
            mask = np.asarray(image) if image.mode == "P" else mask
        if mask.max() > 1:
            shown = ", ".join(map(str, values[:6])) + (", …" if len(values) > 6 else "")
            raise DataError(f"{path}: a mask holds 0 and 255 (or 0 and 1) alone, this one {shown}; save it as PNG")
    return (mask > 0).astype(np.uint8)


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


def _by(size: tuple[int, int]) -> str:
    return f"{size[1]} × {size[0]}"
