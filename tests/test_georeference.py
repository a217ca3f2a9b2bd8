"""Masks that lie where their images lie."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from data.georeference import CRS, GEOTAGS, METRE, NODATA, UNIT, WEB_MERCATOR, Place, common_place, world_file
from dataset import DataError

DOUBLE, SHORT, ASCII = 12, 3, 2


def geokeys(crs: int = 32614, unit: int = METRE) -> tuple[int, ...]:
    return (1, 1, 0, 3, 1024, 0, 1, 1, CRS, 0, 1, crs, UNIT, 0, 1, unit)


def geotags(
    x: float = 600_000.0, scale: float = 0.5, keys: tuple = geokeys(), nodata: str = "-9999"
) -> ImageFileDirectory_v2:
    """A place in UTM zone 14, as GDAL writes it."""
    tags = ImageFileDirectory_v2()
    for tag, kind, value in (
        (33550, DOUBLE, (scale, scale, 0.0)),
        (33922, DOUBLE, (0.0, 0.0, 0.0, x, 3_400_000.125, 0.0)),
        (34735, SHORT, keys),
        (34737, ASCII, "WGS 84 / UTM zone 14N|"),
        (42113, ASCII, nodata),
    ):
        tags.tagtype[tag] = kind
        tags[tag] = value
    return tags


def write_tiff(path: Path, tags: ImageFileDirectory_v2 | None) -> Path:
    Image.new("RGB", (8, 6)).save(path, tiffinfo=tags or {})
    return path


def write_png(path: Path, world: str | None) -> Path:
    Image.new("RGB", (8, 6)).save(path)
    if world is not None:
        world_file(path).write_text(world)
    return path


WORLD = "0.5\n0\n0\n-0.5\n600000.25\n3399999.875\n"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_mask_has_the_tags_of_its_image(tmp_path, dtype):
    pair = [write_tiff(tmp_path / f"{name}.tif", geotags()) for name in "ab"]
    pixels = np.arange(48, dtype=dtype).reshape(6, 8)
    common_place(*pair).save(pixels, tmp_path / "mask.tif")
    with Image.open(tmp_path / "mask.tif") as mask:
        assert np.array_equal(np.asarray(mask), pixels)
        assert {tag: mask.tag_v2[tag] for tag in GEOTAGS if tag in mask.tag_v2} == dict(geotags())


@pytest.mark.parametrize("nodata", ["0", "255"])
def test_a_mask_has_no_value_that_means_nothing(tmp_path, nodata):
    place = Place(write_tiff(tmp_path / "a.tif", geotags(nodata=nodata)))
    assert NODATA not in place.tags and place.affine is not None


@pytest.mark.parametrize("suffix", [".PGW", ".pgw"])
def test_a_world_file_goes_along(tmp_path, suffix):
    path = write_png(tmp_path / "a.png", None)
    path.with_suffix(suffix).write_text(WORLD)
    Place(path).save(np.zeros((6, 8), np.uint8), tmp_path / "mask.tif")
    assert (tmp_path / "mask.tfw").read_text() == WORLD


def test_tags_and_world_files_tell_the_same(tmp_path):
    tags, world = write_tiff(tmp_path / "a.tif", geotags()), write_png(tmp_path / "b.png", WORLD)
    assert Place(tags).affine.tolist() == Place(world).affine.tolist() == [600_000, 3_400_000.125, 0.5, 0, 0, -0.5]
    turned = geotags()
    del turned[33550], turned[33922]
    turned.tagtype[34264] = DOUBLE
    turned[34264] = (0.3, 0.4, 0.0, 6e5, 0.4, -0.3, 0.0, 3e6, *[0.0] * 7, 1.0)
    place = Place(write_tiff(tmp_path / "c.tif", turned))
    assert place.affine.tolist() == [6e5, 3e6, 0.3, 0.4, 0.4, -0.3] and place.pixel_area() == pytest.approx(0.25)


def test_one_of_two_knows_the_place(tmp_path):
    known, unknown = write_tiff(tmp_path / "a.tif", geotags()), write_tiff(tmp_path / "b.tif", None)
    assert dict(common_place(known, unknown).tags) == dict(common_place(unknown, known).tags) == dict(geotags())
    assert common_place(unknown, unknown).affine is None


@pytest.mark.parametrize(
    ("there", "shown"),
    [
        (geotags(x=600_000.01), "600000.01.*600000.0"),
        (geotags(scale=0.6), "0.6.*0.5"),
        (geotags(keys=geokeys(crs=32615)), "EPSG:32615.*EPSG:32614"),
    ],
)
def test_two_places(tmp_path, there, shown):
    pair = write_tiff(tmp_path / "a.tif", geotags()), write_tiff(tmp_path / "b.tif", there)
    with pytest.raises(DataError, match=rf"b\.tif: lies elsewhere than .*a\.tif.*{shown}"):
        common_place(*pair)


def test_less_than_a_hundredth_of_a_pixel_is_one_place(tmp_path):
    common_place(write_tiff(tmp_path / "a.tif", geotags()), write_tiff(tmp_path / "b.tif", geotags(x=600_000.004)))


def test_two_places_in_world_files(tmp_path):
    elsewhere = write_png(tmp_path / "b.png", WORLD.replace("600000.25", "600001"))
    with pytest.raises(DataError, match=r"b\.png: lies elsewhere than .*600000\.75.*not .*600000\.0"):
        common_place(write_png(tmp_path / "a.png", WORLD), elsewhere)


@pytest.mark.parametrize("text", ["", "1 2 3", "0,5 0 0 -0,5 600000 3400000"])
def test_a_world_file_that_is_none(tmp_path, text):
    with pytest.raises(DataError, match=r"a\.pgw: a world file holds six numbers"):
        Place(write_png(tmp_path / "a.png", text))


@pytest.mark.parametrize(
    ("name", "world"), [("x.tif", "x.tfw"), ("x.PNG", "x.pgw"), ("x.jpeg", "x.jgw"), ("a.b.jpg", "a.b.jgw")]
)
def test_names_of_world_files(name, world):
    assert world_file(Path(name)) == Path(world)


@pytest.mark.parametrize(
    ("keys", "area"),
    [
        (geokeys(), 0.25),
        ((1, 1, 0, 1, 1024, 0, 1, 2), None),  # degrees
        (geokeys(unit=9002), None),  # feet
        (geokeys(crs=WEB_MERCATOR), None),
        ((1, 1, 0, 1), None),  # cut short
    ],
)
def test_area_of_a_pixel(tmp_path, keys, area):
    assert Place(write_tiff(tmp_path / "a.tif", geotags(keys=keys))).pixel_area() == area


def test_metres_without_a_place_are_no_area(tmp_path):
    tags = geotags()
    del tags[33550], tags[33922]
    assert Place(write_tiff(tmp_path / "a.tif", tags)).pixel_area() is None
