"""Where an image lies: GeoTIFF tags and world files, read beside images and written beside masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from data.images import DataError

SCALE, TIEPOINT, TRANSFORM, KEYS, NODATA = 33550, 33922, 34264, 34735, 42113  # GeoTIFF's tags (OGC 19-008r4)
GEOTAGS = (SCALE, TIEPOINT, TRANSFORM, KEYS, 34736, 34737, NODATA)
CRS, UNIT = 3072, 3076  # keys of the projected reference system, an EPSG code, and of its unit of length
METRE, WEB_MERCATOR = 9001, 3857  # Web Mercator's metres are no metres on the ground


class Place:
    """Where an image lies, as far as its GeoTIFF tags or its world file tell.

    Attributes:
        affine: float64 (6,), x and y of the upper left corner, of a step to the right and of a step down; or None.
        crs: EPSG code of the projected reference system; None where no tag tells it.

    Raises:
        DataError: a world file that doesn't hold six numbers.
    """

    def __init__(self, path: Path):
        self.tags = ImageFileDirectory_v2()
        with Image.open(path) as image:
            own = getattr(image, "tag_v2", {})
            for tag in GEOTAGS:
                # "No data" is 0 or 255 in many images; in a mask these say that all of it, or all change, is void.
                if tag in own and not (tag == NODATA and own[tag].strip(" \0") in ("0", "255")):
                    self.tags.tagtype[tag] = own.tagtype[tag]
                    self.tags[tag] = own[tag]
        keys = self.tags.get(KEYS, ())
        self._keys = {keys[i]: keys[i + 3] for i in range(4, len(keys) - 3, 4)}
        self.crs = self._keys.get(CRS)
        name = world_file(path)
        names = name, name.with_suffix(name.suffix.upper())
        self._world = next((file.read_bytes() for file in names if file.exists()), None)
        self.affine = None
        if TRANSFORM in self.tags:
            a, b, _, x, d, e, _, y = self.tags[TRANSFORM][:8]
            self.affine = np.array([x, y, a, d, b, e])
        elif SCALE in self.tags and TIEPOINT in self.tags:
            (width, height, *_), (column, row, _, x, y, *_) = self.tags[SCALE], self.tags[TIEPOINT]
            self.affine = np.array([x - column * width, y + row * height, width, 0, 0, -height])
        elif self._world is not None:
            try:
                a, d, b, e, x, y = map(float, self._world.split())
            except ValueError as error:
                raise DataError(f"{name}: a world file holds six numbers, with decimal points ({error})") from error
            self.affine = np.array([x - (a + b) / 2, y - (d + e) / 2, a, d, b, e])  # its x, y: the first pixel's middle

    def pixel_area(self) -> float | None:
        """Square metres of a pixel; None where that isn't known: no place, degrees, feet, Web Mercator."""
        if self.affine is None or self._keys.get(UNIT) != METRE or self.crs == WEB_MERCATOR:
            return None
        a, d, b, e = self.affine[2:]
        return abs(a * e - b * d)

    def save(self, pixels: np.ndarray, path: Path) -> None:
        """Write uint8 or uint16 (H, W) of this place: TIFF with the tags, compressed without loss, or PNG.

        A world file goes along where the image has one, and beside a PNG, which can't hold tags.
        """
        png, world = path.suffix.lower() == ".png", self._world
        tiff = {} if png else {"tiffinfo": self.tags, "compression": "tiff_adobe_deflate"}
        Image.fromarray(pixels).save(path, **tiff)
        if world is None and png and self.affine is not None:
            x, y, a, d, b, e = self.affine.tolist()
            world = "".join(f"{value}\n" for value in (a, d, b, e, x + (a + b) / 2, y + (d + e) / 2)).encode()
        if world is not None:
            world_file(path).write_bytes(world)


def world_file(path: Path) -> Path:
    """The name of an image's world file: x.tif → x.tfw, x.png → x.pgw, x.jpeg → x.jgw."""
    return path.with_suffix(f".{path.suffix[1]}{path.suffix[-1]}w".lower())


def common_place(path_a: Path, path_b: Path) -> Place:
    """The place of two images, from the first that knows it.

    Raises:
        DataError: their places differ, by more than a hundredth of a pixel.
    """
    place_a, place_b = Place(path_a), Place(path_b)
    if place_a.affine is None or place_b.affine is None:
        return place_b if place_a.affine is None else place_a
    pixel, off = np.abs(place_a.affine[2:]).max(), np.abs(place_a.affine - place_b.affine)
    two_systems = place_a.crs and place_b.crs and place_a.crs != place_b.crs
    if off[:2].max() > 0.01 * pixel or off[2:].max() > 1e-5 * pixel or two_systems:
        where = [f"{place.affine.tolist()} in EPSG:{place.crs}" for place in (place_a, place_b)]
        raise DataError(f"{path_b}: lies elsewhere than {path_a}: corner and steps {where[1]}, not {where[0]}")
    return place_a
