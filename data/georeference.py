"""Where an image lies: GeoTIFF tags and world files, read from images and written beside masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from dataset import DataError

SCALE, TIEPOINT, TRANSFORM, KEYS = 33550, 33922, 34264, 34735  # GeoTIFF's tags (OGC 19-008r4)
GEOTAGS = (SCALE, TIEPOINT, TRANSFORM, KEYS, 34736, 34737, 42113)
LINEAR_UNIT, METRE = 3076, 9001  # a key, and its value for metres


def georeference(path_a: Path, path_b: Path) -> ImageFileDirectory_v2:
    """The GeoTIFF tags of a pair, those of A where both have some; empty where neither has.

    Raises:
        DataError: tags or world files say that the two lie in different places.
    """
    read = []
    for path in (path_a, path_b):
        tags = ImageFileDirectory_v2()
        with Image.open(path) as image:
            own = getattr(image, "tag_v2", {})
            for tag in set(GEOTAGS) & set(own):
                tags.tagtype[tag] = own.tagtype[tag]
                tags[tag] = own[tag]
        read.append(tags)
    tags_a, tags_b = read
    for tag in (SCALE, TIEPOINT, TRANSFORM):
        here, there = tags_a.get(tag), tags_b.get(tag)
        if here and there and (len(here) != len(there) or not np.allclose(here, there, rtol=1e-9, atol=1e-9)):
            raise DataError(f"{path_b}: lies elsewhere than {path_a}: GeoTIFF tag {tag} is {there}, not {here}")
    worlds = [world_file(path).read_text().split() for path in (path_a, path_b) if world_file(path).exists()]
    if len(worlds) == 2 and not np.allclose(*(np.array(world, float) for world in worlds), rtol=1e-9):
        raise DataError(f"{path_b}: lies elsewhere than {path_a}: world file {worlds[1]}, not {worlds[0]}")
    return tags_a or tags_b


def world_file(path: Path) -> Path:
    """Where an image's world file is, if it has one: x.tif → x.tfw, x.png → x.pgw, x.jpeg → x.jgw."""
    return path.with_suffix(f".{path.suffix[1]}{path.suffix[-1]}w".lower())


def pixel_area(tags: ImageFileDirectory_v2) -> float | None:
    """Square metres of a pixel; None where the tags don't tell them, or tell degrees or feet."""
    keys = tags.get(KEYS, ())
    units = {key: value for key, _, _, value in zip(*(iter(keys),) * 4, strict=True)}
    if units.get(LINEAR_UNIT) != METRE:
        return None
    if SCALE in tags:
        return abs(tags[SCALE][0] * tags[SCALE][1])
    a, b, _, _, d, e = tags[TRANSFORM][:6]
    return abs(a * e - b * d)


def write(path: Path, pixels: np.ndarray, tags: ImageFileDirectory_v2) -> None:
    """Save uint8 or uint16 (H, W) as PNG, or as TIFF with the tags, compressed without loss."""
    options = {"tiffinfo": tags, "compression": "tiff_adobe_deflate"} if path.suffix.lower() != ".png" else {}
    Image.fromarray(pixels).save(path, **options)
