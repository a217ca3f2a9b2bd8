"""Masks that lie where their images lie."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from data.georeference import GEOTAGS, LINEAR_UNIT, METRE, georeference, pixel_area, world_file, write
from dataset import DataError

DOUBLE, SHORT, ASCII = 12, 3, 2
KEYS = (1, 1, 0, 3, 1024, 0, 1, 1, 3072, 0, 1, 32614, LINEAR_UNIT, 0, 1, METRE)


def geotags(x: float = 600_000.0, scale: float = 0.5, keys: tuple = KEYS) -> ImageFileDirectory_v2:
    """A place in UTM zone 14, as GDAL writes it."""
    tags = ImageFileDirectory_v2()
    for tag, kind, value in (
        (33550, DOUBLE, (scale, scale, 0.0)),
        (33922, DOUBLE, (0.0, 0.0, 0.0, x, 3_400_000.125, 0.0)),
        (34735, SHORT, keys),
        (34737, ASCII, "WGS 84 / UTM zone 14N|"),
        (42113, ASCII, "0"),
    ):
        tags.tagtype[tag] = kind
        tags[tag] = value
    return tags


def write_tiff(path: Path, tags: ImageFileDirectory_v2 | None) -> Path:
    Image.new("RGB", (8, 6)).save(path, tiffinfo=tags or {})
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_mask_has_the_tags_of_its_image(tmp_path, dtype):
    pair = [write_tiff(tmp_path / f"{name}.tif", geotags()) for name in "ab"]
    pixels = np.arange(48, dtype=dtype).reshape(6, 8)
    write(tmp_path / "mask.tif", pixels, georeference(*pair))
    with Image.open(tmp_path / "mask.tif") as mask:
        assert np.array_equal(np.asarray(mask), pixels)
        assert {tag: mask.tag_v2[tag] for tag in GEOTAGS if tag in mask.tag_v2} == dict(geotags())


def test_one_of_two_knows_the_place(tmp_path):
    known, unknown = write_tiff(tmp_path / "a.tif", geotags()), write_tiff(tmp_path / "b.tif", None)
    assert dict(georeference(known, unknown)) == dict(georeference(unknown, known)) == dict(geotags())
    assert not georeference(unknown, unknown)


@pytest.mark.parametrize(
    ("there", "shown"), [(geotags(x=600_001), r"600001\.0.*600000\.0"), (geotags(scale=0.6), r"0\.6.*0\.5")]
)
def test_two_places(tmp_path, there, shown):
    pair = write_tiff(tmp_path / "a.tif", geotags()), write_tiff(tmp_path / "b.tif", there)
    with pytest.raises(DataError, match=rf"b\.tif: lies elsewhere than .*a\.tif.*{shown}"):
        georeference(*pair)


def test_two_places_in_world_files(tmp_path):
    pair = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, x in zip(pair, (600_000, 600_000.5), strict=True):
        Image.new("RGB", (8, 6)).save(path)
        path.with_suffix(".pgw").write_text(f"0.5\n0\n0\n-0.5\n{x}\n3400000\n")
    with pytest.raises(DataError, match=r"b.png: lies elsewhere than .*600000.5.*not .*600000'"):
        georeference(*pair)


@pytest.mark.parametrize(
    ("name", "world"), [("x.tif", "x.tfw"), ("x.PNG", "x.pgw"), ("x.jpeg", "x.jgw"), ("a.b.jpg", "a.b.jgw")]
)
def test_names_of_world_files(name, world):
    assert world_file(Path(name)) == Path(world)


def test_area_of_a_pixel():
    assert pixel_area(geotags()) == 0.25
    assert pixel_area(geotags(keys=(1, 1, 0, 1, 1024, 0, 1, 2))) is None  # degrees
    assert pixel_area(geotags(keys=(1, 1, 0, 1, LINEAR_UNIT, 0, 1, 9002))) is None  # feet
    assert pixel_area(ImageFileDirectory_v2()) is None
    turned = geotags()
    del turned[33550], turned[33922]
    turned.tagtype[34264] = DOUBLE
    turned[34264] = (0.3, 0.4, 0.0, 6e5, 0.4, -0.3, 0.0, 3e6, *[0.0] * 7, 1.0)
    assert pixel_area(turned) == pytest.approx(0.25)
