"""Images from files to arrays: pairing by name, decoding, and every complaint about what can't be read."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
ImageLike = Tensor | np.ndarray | str | os.PathLike
MAX_PIXELS = 400_000_000  # an image may hold, 20,000 × 20,000: a small file of a stranger may unpack to more


class DataError(ValueError):
    """Input that can't be used; the message says what is wrong, in which file, and what to do."""


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
