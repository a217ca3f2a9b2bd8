"""Bad and odd input: each ends in the right result, or in one line that names what is wrong."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_pair, write_pair, write_tiny
from PIL import Image

import main
from dataset import LEVIRCD, DataError, find_pairs, read_image, read_mask
from model import ModelError

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of what it sees in such files
PAIR = random_pair(np.random.default_rng(0), 33, 47)
PIXELS, MASK = PAIR[1], PAIR[2]
RGB, GREY = Image.fromarray(PIXELS), Image.fromarray(PIXELS).convert("L")


@pytest.fixture(params=["rasterio", "Pillow alone"])
def reader(request, monkeypatch):
    """Both ways to read a TIFF."""
    if request.param == "rasterio":
        pytest.importorskip("rasterio", reason="rasterio isn't installed")
    else:
        monkeypatch.setitem(sys.modules, "rasterio", None)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A colour PNG of any header, also of one that Pillow doesn't write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_with(kind: bytes, body: bytes) -> bytes:
    return png(47, 33, 8, b"".join(b"\0" + row.tobytes() for row in PIXELS), chunk(kind, body))


def saved(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(content, kind, **options)
    return content.getvalue()


def geotiff(pixels: np.ndarray, **profile: object) -> bytes:
    """A TIFF that rasterio writes, of (H, W) or (H, W, C)."""
    rasterio = pytest.importorskip("rasterio", reason="rasterio isn't installed")
    height, width, count = np.atleast_3d(pixels).shape
    profile |= {"driver": "GTiff", "height": height, "width": width, "count": count, "dtype": pixels.dtype}
    with rasterio.MemoryFile() as memory:
        with memory.open(**profile) as file:
            file.write(np.moveaxis(np.atleast_3d(pixels), -1, 0))
        return memory.read()


def turned(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


# Images: the file, and what is said of it, or how it is read: as PIXELS, or as Pillow decodes it by itself.

SOFT = np.dstack([PIXELS, np.full((33, 47), 255, np.uint8)])
SOFT[0, 0, 3] = 100
IMAGES = {
    "cut short": (saved(RGB)[:900], "can't be decoded"),
    "no bytes": (b"", "can't be decoded"),
    "palette": (saved(RGB.convert("P")), None),
    "see-through palette": (saved(RGB.convert("P"), transparency=RGB.convert("P").getpixel((0, 0))), None),
    "opaque": (saved(RGB.convert("RGBA")), PIXELS),
    "see-through": (saved(Image.new("RGBA", RGB.size)), "void all over"),
    "partly transparent": (saved(SOFT), "partly transparent"),
    "grey": (saved(GREY), "not an image of red, green and blue"),
    "16-bit grey": (saved(PIXELS[..., 0].astype(np.uint16)), "more than 8 bits.*gdal_translate"),
    "16-bit colour": (png(47, 33, 16, (b"\0" + b"\1\2" * 3 * 47) * 33), "more than 8 bits"),
    "CMYK": (saved(RGB.convert("CMYK"), "JPEG"), "not an image of red, green and blue"),
    "turned JPEG": (saved(RGB, "JPEG", exif=turned(6)), "turned by its orientation tag"),
    "turned TIFF": (saved(RGB, "TIFF", tiffinfo={274: 3}), "turned by its orientation tag"),
    "upright by its tag": (saved(RGB, "JPEG", exif=turned(1)), None),
    "TIFF": (saved(RGB, "TIFF"), PIXELS),
    "TIFF of two pages": (saved(RGB, "TIFF", save_all=True, append_images=[RGB]), "2 pages|pip install rasterio"),
    "4 billion pixels in 200 bytes": (png(65_000, 65_000, 8, b""), "65000 × 65000 pixels are more than"),
    "2 MB of text": (png_with(b"zTXt", b"k\0\0" + zlib.compress(bytes(2_000_000))), PIXELS),
    "broken EXIF": (png_with(b"eXIf", b"no tags"), PIXELS),
}  # fmt: skip


@pytest.mark.parametrize("title", IMAGES)
def test_images(title, reader, tmp_path):
    content, expected = IMAGES[title]
    file = tmp_path / "x.png"  # Pillow and rasterio both go by the content
    file.write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=rf"^{re.escape(str(file))}: .*({expected})") as error:
            read_image(file)
        assert "\n" not in str(error.value)
    else:
        rgb, void = read_image(file)
        assert np.array_equal(rgb, np.asarray(Image.open(file).convert("RGB")) if expected is None else expected)
        assert (void is not None) == ("see-through" in title)


@pytest.mark.parametrize(
    ("profile", "bands", "expected"),
    [
        ({"photometric": "MINISBLACK"}, 3, PIXELS),  # as gdal_translate writes bands without a colour
        ({"photometric": "MINISBLACK"}, 4, PIXELS),  # the fourth is infrared, perhaps
        ({}, 4, PIXELS),  # GDAL calls it alpha unless told otherwise, but it isn't
        ({}, 5, "not an image of red, green and blue"),
    ],
)
def test_images_as_gdal_writes_them(profile, bands, expected, tmp_path, capsys):
    file = tmp_path / "x.tif"
    file.write_bytes(geotiff(np.dstack([PIXELS, PIXELS])[..., :bands], **profile))
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            read_image(file)
    else:
        rgb, void = read_image(file)
        assert np.array_equal(rgb, expected) and void is None
        assert capsys.readouterr().out.count("four bands") == (bands == 4)


# Masks


def speckled(mask: np.ndarray, high: int, *others: int) -> np.ndarray:
    """The mask with a few of its pixels of 255 a little lower, and a few others; those below 128 where it is 0."""
    mask, (changed, unchanged) = mask.copy(), (np.flatnonzero(mask), np.flatnonzero(mask == 0))
    mask.flat[changed[:35]] = high
    for i, value in enumerate(others, 1):
        mask.flat[(changed if value > 127 else unchanged)[35 + 3 * i :][:3]] = value
    return mask


def coloured(*colours: tuple[int, int, int]) -> Image.Image:
    """The first colour where there is change, the others in rows of it."""
    image = np.zeros((*MASK.shape, 3), np.uint8)
    image[MASK > 0] = colours[0]
    for i, colour in enumerate(colours[1:], 1):
        image[i::3][MASK[i::3] > 0] = colour
    return Image.fromarray(image)


def paletted(mask: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray((mask > 0).astype(np.uint8))
    image.putpalette([band for colour in colours for band in colour])
    return image


TWO_READINGS = "give IGNORE=255 if 255 is not to be looked at"
PICTURE = "one colour on black; this one is a picture"
# The mask, and what is said of it, or what it is read as; once as PNG or as the suffix says, once as TIFF.
MASKS = {
    "0 and 255": (MASK, MASK),
    "all 0": (MASK * 0, MASK * 0),
    "all 255": (MASK | 255, MASK | 255),
    "0 and 1": (MASK // 255, MASK),
    "1 bit": (MASK > 0, MASK),
    "0, 1 and 255": (speckled(MASK, 255, 1), f"this one 0, 1, 255; {TWO_READINGS}"),
    "0, 1 and 65535": (np.maximum(speckled(MASK, 255, 1), MASK * np.uint16(257)), f"0, 1, 65535; {TWO_READINGS}"),
    "grey values": (GREY, "a mask holds 0 and 255"),
    "a photograph": (RGB, PICTURE),
    "16 bits": (MASK.astype(np.uint16), MASK),
    "two bands, see-through": (Image.new("LA", RGB.size), "partly transparent; a mask is opaque"),
    "grey as RGB": (Image.fromarray(MASK).convert("RGB"), MASK),
    "one colour": (Image.new("RGB", RGB.size, (255, 0, 0)), PICTURE),
    "red and white on black": (coloured((255, 0, 0), (255, 255, 255)), PICTURE),
    "four bands, opaque": (Image.fromarray(MASK).convert("RGBA"), MASK),
    "a palette of white and green": (paletted(MASK, (255, 255, 255), (0, 200, 0)), MASK),
}  # fmt: skip
ODD_MASKS = {  # how these were read is said
    "35 pixels of 254": (speckled(MASK, 254), MASK),
    "1, 213 and 254 along edges": (speckled(MASK, 254, 213, 1), MASK),
    "16 bits, 0 and 65535": (MASK * np.uint16(257), MASK),
    "red on black": (coloured((255, 0, 0)), MASK),
    "a palette of black and brown": (paletted(MASK, (0, 0, 0), (90, 60, 20)), MASK),
    "a palette, its black last": (paletted(255 - MASK, (90, 60, 20), (0, 0, 0)), MASK),
}  # fmt: skip


def assert_read(file: Path, expected: np.ndarray | str, num_classes: int = 1) -> str:
    """How the mask was read in words, once it is seen to be read as expected, 255 as change or void."""
    if isinstance(expected, str):
        with pytest.raises(DataError, match=rf"^{re.escape(str(file))}: .*{expected}") as error:
            read_mask(file, num_classes)
        assert "\n" not in str(error.value)
        return ""
    label, remark = read_mask(file, num_classes)
    assert label.dtype == np.uint8 and np.array_equal(label, expected)
    return remark


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("title", MASKS | ODD_MASKS)
def test_masks(title, kind, reader, tmp_path):
    mask, expected = (MASKS | ODD_MASKS)[title]
    (tmp_path / "x").write_bytes(saved(mask, kind))
    remark = assert_read(tmp_path / "x", expected if isinstance(expected, str) else expected // 255)
    assert bool(remark) == (title in ODD_MASKS)


@pytest.mark.parametrize("image", [Image.fromarray(MASK), coloured((255, 0, 0))])
def test_masks_as_jpeg(image, tmp_path):
    (tmp_path / "x.jpg").write_bytes(saved(image, "JPEG", quality=95, subsampling=0))
    assert "above 127 is change" in assert_read(tmp_path / "x.jpg", MASK // 255)


ONES, OUTSIDE = MASK // 255, np.zeros(MASK.shape, bool)
OUTSIDE[:3] = True
LABEL = np.where(OUTSIDE, 255, ONES).astype(np.uint8)


@pytest.mark.parametrize(
    ("values", "profile", "num_classes", "expected"),
    [
        (LABEL, {"nodata": 255}, 1, LABEL),
        (np.where(OUTSIDE, np.int16(-9999), ONES), {"nodata": -9999}, 1, LABEL),
        (np.where(OUTSIDE, np.float32(-3.4e38), ONES), {"nodata": -3.4e38}, 1, LABEL),
        (np.where(OUTSIDE, np.nan, ONES), {"nodata": np.nan}, 1, LABEL),
        (np.where(OUTSIDE, np.nan, ONES), {}, 1, LABEL),  # without a tag, too
        (ONES, {"nodata": 0}, 1, ONES),  # else nothing would be unchanged
        (ONES.astype(np.int64), {}, 1, ONES),
        (MASK.astype(np.float32) / -255, {}, 1, "holds no negative or infinite values, this one -1 to 0"),
        (3 * ONES, {"nbits": 2}, 1, ONES),  # the highest of two bits
        (ONES, {"nbits": 2}, 1, ONES),
        (speckled(ONES, 2, 3), {"nbits": 2}, 3, speckled(ONES, 2, 3)),
        (speckled(ONES, 2, 3), {"nbits": 2}, 1, "this one 0, 1, 2, 3"),
        (ONES * np.uint16(3), {}, 3, 3 * ONES),
        (ONES * np.uint16(300), {}, 3, "holds 0 to 3 where NUM_CLASSES=3, this one 0, 300"),
        (np.dstack([MASK, MASK // 2, MASK * 0]), {}, 3, "coloured; the classes of a mask are numbers"),
    ],
)
def test_masks_of_any_number_of_bits_and_pixels_without_data(values, profile, num_classes, expected, tmp_path, capsys):
    (tmp_path / "x.tif").write_bytes(geotiff(values, **profile))
    remark = assert_read(tmp_path / "x.tif", expected, num_classes)
    assert remark == ("have pixels without data, which are ignored" if expected is LABEL else "")
    assert ("0 is unchanged in the masks" in capsys.readouterr().out) == (profile.get("nodata") == 0)


def test_a_mask_file_beside_a_mask_says_where_it_is_void(tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="rasterio isn't installed")
    (tmp_path / "x.tif").write_bytes(geotiff(ONES))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(tmp_path / "x.tif", "r+") as file:
        file.write_mask(~OUTSIDE)
    assert_read(tmp_path / "x.tif", LABEL)
    (tmp_path / "x.png").write_bytes(saved(ONES))
    (tmp_path / "x.tif.msk").rename(tmp_path / "x.png.msk")
    assert_read(tmp_path / "x.png", LABEL)


# Folders


def write(path: str, content: bytes = b"x", link: str | None = None) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).unlink(missing_ok=True)
    Path(path).symlink_to(link) if link else Path(path).write_bytes(content)


FOLDERS = {
    "a link to a file": (lambda: (os.rename("val/B/x.png", "x"), write("val/B/x.png", link="../../x")), ""),
    "a link to nothing": (lambda: write("val/B/x.png", link="nowhere"), "val/B/x.png: a link that leads nowhere"),
    "another size": (lambda: write("val/B/x.png", saved(PIXELS[:8])), r"val/B/x\.png: 47 × 8 .* has 47 × 33"),
    "a mask's size": (lambda: write("val/label/x.png", saved(MASK[:8])), r"val/label/x\.png: 47 × 8 .* has 47 × 33"),
    "a mask is missing": (lambda: os.unlink("val/label/x.png"), "no images|no file of that name in"),
    "no folder": (lambda: shutil.rmtree("val"), "val/A: no such folder"),
    "empty": (lambda: [path.unlink() for path in Path().glob("val/*/*")], "val/A and val/B and val/label: no images"),
    "x.png and x.tif": (lambda: write("val/B/x.tif"), "val/B/x.*: a second file beside x"),
    "hidden and system files": (lambda: [write(f"val/A/{name}") for name in (
        ".DS_Store", "._x.png", ".gitkeep", "Thumbs.db", "@eaDir/x.png/SYNO_THUMB.jpg", "#recycle/x.png", ".git/y.png",
        "$RECYCLE.BIN/y.png", "__MACOSX/._y.png", "sub/@eaDir/y.png")], ""),
}  # fmt: skip


@pytest.mark.parametrize("title", FOLDERS)
def test_folders(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pair(Path("val"), "x", *PAIR)
    prepare, expected = FOLDERS[title]
    prepare()
    if expected:
        with pytest.raises(DataError, match=expected) as error:
            LEVIRCD(".", "val")
        assert "\n" not in str(error.value)
    else:
        assert np.array_equal(LEVIRCD(".", "val")[0][1].permute(1, 2, 0), PIXELS)


def test_pairs_by_suffix_are_told_how_to_rename(tmp_path):
    for number in ("01 a", "02"):
        write(f"{tmp_path}/it's A/{number}_pre_disaster.png")
        write(f"{tmp_path}/B/{number}_post_disaster.png")
    folders = tmp_path / "it's A", tmp_path / "B"
    with pytest.raises(DataError) as error:
        find_pairs(*folders)
    subprocess.run(["sh", "-c", str(error.value).partition("; rename: ")[2]], check=True)
    assert len(find_pairs(*folders)) == 2


# Constants, checkpoints, runs: up to where a run would begin

CONSTANTS = {name: getattr(main, name) for name in main.TYPES} | {"EPOCHS": 5, "WEIGHTS": None}


class Payload:
    """What a malicious checkpoint holds: unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, ("harm",)


def a_run(content: bytes = b"", **constants: object) -> None:
    record = {"constants": CONSTANTS | constants, "demo": False, "id": "1"}
    write("runs/old/constants.json", content or json.dumps(record).encode())


EVALUATE, RESUME = {"EVALUATE": "best.pt", "DEVICE": "cpu"}, {"RESUME": "runs/old"}
DAMAGED = "best.pt: not a checkpoint, or damaged"
WRONG = "LEARNING_RATE=nan CROP_SIZE=0 DATA_DIR=None NUM_WORKERS=-1 DEVICE=tpu9 DEVICE=meta RUN_NAME=../up WEIGHTS=V9"
RUNS = {
    "RUN_NAME is there": (a_run, {"RUN_NAME": "old"}, "RUN_NAME=old: must be a new name"),
    "no data": (None, {"DATA_DIR": "nowhere"}, "nowhere/train/A: no such folder"),
    "checkpoint: text": (lambda: write("best.pt", b"epoch,train_loss"), EVALUATE, DAMAGED),
    "checkpoint: code in the pickle": (lambda: torch.save({"model": Payload()}, "best.pt"), EVALUATE, DAMAGED),
    "checkpoint: cut short": (lambda: write("best.pt", b"PK\3\4" + bytes(2000)), EVALUATE, DAMAGED),
    "checkpoint: no backbone": (lambda: torch.save({"model": {}, "model_args": {}}, "best.pt"), EVALUATE, "holds no"),
    "checkpoint: a tensor": (lambda: torch.save(torch.zeros(3), "best.pt"), EVALUATE, DAMAGED),
    "RESUME: nowhere": (None, {"RESUME": "nowhere"}, "nowhere: not the folder of a run"),
    "RESUME: a damaged record": (lambda: a_run(b"{"), RESUME, "not the folder of a run"),
    "RESUME: a record of something else": (lambda: a_run(b"[]"), RESUME, "not the folder"),
    "RESUME: a run that scored": (lambda: a_run(EVALUATE="best.pt"), RESUME, "that run only scored best.pt"),
    "RESUME: another seed": (a_run, RESUME | {"SEED": 3}, "SEED=3: the run began with 0"),
    "RESUME: fewer epochs": (a_run, RESUME | {"EPOCHS": 4}, "EPOCHS=4: may be raised, but not lowered"),
    "RESUME and EVALUATE": (a_run, RESUME | EVALUATE, "EVALUATE=best.pt: the run began with None"),
    "EVALUATE: a run's folder": (a_run, {"EVALUATE": "runs/old"}, "runs/old/best.pt: no such checkpoint"),
    **{text: (None, dict([text.split("=")]), f"(?i){text.partition('=')[0]}") for text in WRONG.split()},
}  # fmt: skip


@pytest.mark.parametrize("title", RUNS)
def test_runs(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare, constants, expected = RUNS[title]
    if prepare:
        prepare()
    write_tiny(Path("tiny"))
    small = {"DATA_DIR": "tiny", "CROP_SIZE": 32, "BACKBONE": "resnet18", "WEIGHTS": None}
    constants = constants if "RESUME" in constants else small | constants
    with pytest.raises((main.OptionError, DataError, ModelError, OSError), match=expected) as error:
        main.main(**main.from_command_line([f"{name}={value}" for name, value in constants.items()]))
    assert "\n" not in str(error.value)
    assert not Path("harm").exists() and not list(Path().glob("runs/20*"))
