"""Bad and odd input: each ends in the right result, or in one line that names what is wrong.

    python tests/test_bad_input.py

prints the table of what was given and what became of it.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import os
import re
import shutil
import struct
import sys
import tempfile
import threading
import traceback
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import random_pair, write_pair, write_tiny

import main
from data.download import DownloadError, download
from dataset import LEVIRCD, DataError, read_mask, read_rgb
from model import FusionUNet, ModelError, read_checkpoint

# What `python main.py`, `visualize.py` and `download.py` print in one line.
ERRORS = (main.OptionError, DataError, ModelError, DownloadError, FloatingPointError, OSError)
PAIR = random_pair(np.random.default_rng(0), 33, 47)
RGB, GREY = Image.fromarray(PAIR[1]), Image.fromarray(PAIR[1]).convert("L")


def png(width: int, height: int, depth: int, data: bytes) -> bytes:
    """A colour PNG of any header, also of one that Pillow doesn't write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def interlaced_png(array: np.ndarray) -> bytes:
    """Adam7's seven passes, each row unfiltered; Pillow reads this and writes none."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    parts = [array[y::dy, x::dx] for y, x, dy, dx in passes]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    plain = png(array.shape[1], array.shape[0], 8, rows)
    header = plain[12:28] + b"\1"  # the last byte of IHDR says that it is interlaced
    return plain[:12] + header + struct.pack(">I", zlib.crc32(header)) + plain[33:]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def saved(image: Image.Image, suffix: str = ".png", **options: object) -> tuple[str, bytes]:
    """The file's suffix and content."""
    content = io.BytesIO()
    image.save(content, {".png": "PNG", ".jpg": "JPEG", ".tif": "TIFF", ".bmp": "BMP"}[suffix], **options)
    return suffix, content.getvalue()


def speckled(mask: np.ndarray, high: int, *others: int) -> np.ndarray:
    """The mask with a few of its pixels of 255 a little lower, and a few others; those below 128 where it is 0."""
    mask, (changed, unchanged) = mask.copy(), (np.flatnonzero(mask), np.flatnonzero(mask == 0))
    mask.flat[changed[:35]] = high
    for i, value in enumerate(others, 1):
        mask.flat[(changed if value > 127 else unchanged)[35 + 3 * i :][:3]] = value
    return mask


def coloured(mask: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    """Of the first colour where there is change, the other ones in rows of it."""
    image = np.zeros((*mask.shape, 3), np.uint8)
    for i, colour in enumerate(colours):
        image[i::3][mask[i::3] > 0] = colour
        if i == 0:
            image[mask > 0] = colour
    return Image.fromarray(image)


def paletted(mask: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    """The numbers 0 and 1 in the two colours."""
    image = Image.fromarray((mask > 0).astype(np.uint8))
    image.putpalette([band for colour in colours for band in colour])
    return image


class Payload:
    """What a malicious checkpoint holds: unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, ("harm",)


def whole(expected: Image.Image | None = None) -> Callable[[], bool]:
    """Whether the pair x of val is read as it should be, image B as `expected`."""

    def check() -> bool:
        _, image_b, _ = LEVIRCD(".", "val")[0]
        return np.array_equal(image_b.permute(1, 2, 0), np.asarray((expected or RGB).convert("RGB")))

    return check


def mask_is(expected: np.ndarray) -> Callable[[], bool]:
    return lambda: np.array_equal(LEVIRCD(".", "val")[0][2][0], expected > 0)


def put(folder: str, content: tuple[str, bytes]) -> Callable[[], None]:
    """In place of a file of pair x."""

    def act() -> None:
        Path("val", folder, "x.png").unlink()
        Path("val", folder, f"x{content[0]}").write_bytes(content[1])

    return act


def run(**constants: object) -> Callable[[], object]:
    """`python main.py` with these constants, up to where it would begin."""
    small = (
        {} if "RESUME" in constants else {"DATA_DIR": "tiny", "CROP_SIZE": 32, "BACKBONE": "resnet18", "WEIGHTS": None}
    )
    arguments = [f"{name}={value}" for name, value in (small | constants).items()]
    return lambda: write_tiny(Path("tiny")) and main.main(**main.from_command_line(arguments))


def nothing() -> None:
    pass


def later(change: Callable[[], object], cache: bool) -> Callable[[], bool]:
    """Whether the pair is read as it should be although something changes after the data set was made."""

    def check() -> bool:
        data = LEVIRCD(".", "val", cache_dir="cache" if cache else None)
        change()
        return np.array_equal(data[0][1].permute(1, 2, 0), PAIR[1])

    return check


def each(pattern: str, act: Callable[[Path], object]) -> Callable[[], None]:
    return lambda: [act(path) for path in list(Path().glob(pattern))] and None


def write(path: str, content: str | bytes = "", link: str | None = None) -> Callable[[], None]:
    def act() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).unlink(missing_ok=True)
        Path(path).symlink_to(link) if link else Path(path).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )

    return act


def checkpoint(change: Callable[[dict], object]) -> Callable[[], None]:
    def act() -> None:
        torch.save(change(model().checkpoint()), "best.pt")

    return act


@functools.cache
def model() -> FusionUNet:
    return FusionUNet(weights=None, backbone="resnet18")


def flip_a_weight() -> None:
    checkpoint(lambda content: content)()
    content = bytearray(Path("best.pt").read_bytes())
    content[len(content) // 2] ^= 1
    Path("best.pt").write_bytes(content)


def unpack(entry: str | None, content: bytes = b"evil") -> Callable[[], bool]:
    """Fetches an archive with this entry, or one that is no archive; whether nothing lies outside its folder."""

    def act() -> bool:
        Path("served").mkdir()
        with open("served/train.zip", "wb") as file:
            if entry is None:
                file.write(content)
            else:
                with zipfile.ZipFile(file, "w") as archive:
                    archive.writestr(entry, content)
        checksum = hashlib.md5(Path("served/train.zip").read_bytes()).hexdigest()
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="served")
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            try:
                download("fetched/here", f"http://127.0.0.1:{server.server_port}", {"train": checksum})
            finally:
                server.shutdown()
        inside = Path("fetched/here/train")
        return all(path.is_relative_to(inside) for path in Path().rglob("*evil*"))

    return act


LOAD = whole()
EVALUATE = run(EVALUATE="best.pt", DEVICE="cpu")
SMALL = saved(Image.new("RGB", (8, 8)))
MASK = PAIR[2]
RECORD = '{"constants": {"EVALUATE": null, "EPOCHS": 5, "SEED": 0, "RUN_NAME": null}, "demo": false, "id": "1"}'
A_RUN = write("runs/old/constants.json", RECORD)

# What is given: how it comes about, what is done with it, and what is said; no words: the right result.
CASES: dict[str, tuple[Callable[[], object], Callable[[], object], str]] = {
    # Images
    "image: cut short": (put("B", (".png", saved(RGB)[1][:900])), LOAD, "B/x.png: damaged or cut short"),
    "image: no bytes": (put("B", (".png", b"")), LOAD, "B/x.png: can't be read"),
    "image: text": (put("B", (".png", b"an image")), LOAD, "B/x.png: can't be read"),
    "image: a PNG called .tif": (put("B", (".tif", saved(RGB)[1])), LOAD, ""),
    "image: palette": (put("B", saved(RGB.convert("P"))), whole(RGB.convert("P")), ""),
    "image: RGBA, opaque": (put("B", saved(RGB.convert("RGBA"))), LOAD, ""),
    "image: RGBA, see-through": (put("B", saved(Image.new("RGBA", RGB.size))), LOAD, "B/x.png: void all over"),
    "image: palette with a see-through colour": (
        put("B", saved(RGB.convert("P"), transparency=RGB.convert("P").getpixel((0, 0)))), whole(RGB.convert("P")), "",
    ),
    "image: 1 bit": (put("B", saved(RGB.convert("1"))), LOAD, "B/x.png: one band, grey"),
    "image: grey": (put("B", saved(GREY)), LOAD, "B/x.png: one band, grey"),
    "image: grey with alpha": (put("B", saved(GREY.convert("LA"))), LOAD, "B/x.png: one band, grey"),
    "image: 16-bit grey": (
        put("B", saved(Image.fromarray(PAIR[1][..., 0].astype(np.uint16)))), LOAD, "more than 8 bits",
    ),
    "image: 16-bit colour": (
        put("B", (".png", png(47, 33, 16, (b"\0" + b"\1\2" * 3 * 47) * 33))), LOAD, "B/x.png: more than 8 bits",
    ),
    "image: floats": (put("B", saved(GREY.convert("F"), ".tif")), LOAD, "B/x.tif: more than 8 bits"),
    "image: CMYK": (put("B", saved(RGB.convert("CMYK"), ".jpg")), LOAD, "B/x.jpg: colour mode CMYK"),
    "image: Lab colours": (put("B", saved(Image.new("LAB", RGB.size), ".tif")), LOAD, "B/x.tif: colour mode LAB"),
    "image: turned by its EXIF tag": (
        put("B", saved(RGB, ".jpg", exif=exif(6))), LOAD, "B/x.jpg: turned by its orient",
    ),
    "image: turned TIFF": (put("B", saved(RGB, ".tif", tiffinfo={274: 3})), LOAD, "B/x.tif: turned by its orientation"),
    "image: upright by its EXIF tag": (
        put("B", saved(RGB, ".jpg", exif=exif(1))), whole(Image.open(io.BytesIO(saved(RGB, ".jpg")[1]))), "",
    ),
    "image: interlaced": (put("B", (".png", interlaced_png(PAIR[1]))), LOAD, ""),
    "image: progressive JPEG": (
        put("B", saved(RGB, ".jpg", progressive=True)), whole(Image.open(io.BytesIO(saved(RGB, ".jpg")[1]))), "",
    ),
    "image: TIFF of two pages": (
        put("B", saved(RGB, ".tif", save_all=True, append_images=[RGB])), LOAD, "B/x.tif: 2 pages; save the one",
    ),
    "image: TIFF with an overview": (
        put("B", saved(RGB, ".tif", save_all=True, append_images=[RGB.reduce(2)])), LOAD, "",
    ),
    "image: BigTIFF": (put("B", saved(RGB, ".tif", big_tiff=True)), LOAD, ""),
    "image: 420 million pixels in 200 bytes": (
        put("B", (".png", png(21_000, 20_000, 8, b""))), LOAD, "B/x.png: .*more than",
    ),
    "image: 4 billion pixels in 200 bytes": (
        put("B", (".png", png(65_000, 65_000, 8, b""))), LOAD, "B/x.png: can't be read",
    ),
    "image: no pixels": (put("B", (".png", png(0, 0, 8, b""))), LOAD, "B/x.png: "),
    "image: of another size": (put("B", SMALL), LOAD, "B/x.png: 8 × 8 pixels, but .*A/x.png has 47 × 33"),
    "image: smaller than the crop": (
        nothing, lambda: LEVIRCD(".", "val", 40, augment=True), "less than the crop of 40",
    ),
    "name: spaces and letters of many languages": (
        each("val/*/x.png", lambda path: path.rename(path.with_name("ü 名 x.y.png"))), LOAD, "",
    ),
    "link: to a file": (
        each("val/B/x.png", lambda path: (path.rename("elsewhere.png"), path.symlink_to("../../elsewhere.png"))), LOAD,
        "",
    ),
    "link: to nothing": (write("val/B/x.png", link="nowhere"), LOAD, "A/x.png: no file of that name in val/B"),
    "link: to itself": (write("val/B/x.png", link="x.png"), LOAD, "symbolic links: 'val/B/x.png'"),
    "a file that vanishes": (nothing, later(Path("val/B/x.png").unlink, cache=False), "B/x.png: can't be read"),
    "a cached pair that vanishes": (
        nothing, later(lambda: shutil.rmtree("cache") or os.mkdir("cache"), cache=True), "",
    ),
    "a cached pair that is cut short": (
        nothing, later(each("cache/*.npy", lambda path: path.write_bytes(path.read_bytes()[:500])), cache=True), "",
    ),
    # Masks
    "mask: grey values": (put("label", saved(GREY)), LOAD, "label/x.png: a mask holds 0 and 255"),
    "mask: 1 and 255": (put("label", saved(Image.fromarray(MASK | 1))), LOAD, "label/x.png: a mask holds 0 and 255"),
    "mask: all 0": (put("label", saved(Image.fromarray(MASK * 0))), mask_is(MASK * 0), ""),
    "mask: all 255": (put("label", saved(Image.fromarray(MASK | 255))), mask_is(MASK | 255), ""),
    "mask: 0 and 1": (put("label", saved(Image.fromarray(MASK // 255))), mask_is(MASK), ""),
    "mask: 1 bit": (put("label", saved(Image.fromarray(MASK > 0))), mask_is(MASK), ""),
    "mask: coloured": (put("label", saved(RGB)), LOAD, "label/x.png: a mask holds 0 and 255"),
    "mask: one colour": (put("label", saved(Image.new("RGB", RGB.size, (255, 0, 0)))), LOAD, "a mask holds 0 and 255"),
    "mask: two bands, opaque": (put("label", saved(Image.fromarray(MASK).convert("LA"))), mask_is(MASK), ""),
    "mask: two bands, see-through": (
        put("label", saved(Image.new("LA", RGB.size))), LOAD, "label/x.png: partly transp",
    ),
    "mask: JPEG": (put("label", saved(Image.fromarray(MASK), ".jpg")), mask_is(MASK), ""),
    "mask: 16 bits": (put("label", saved(Image.fromarray(MASK.astype(np.uint16)))), mask_is(MASK), ""),
    "mask: 16 bits, 0 and 65535": (put("label", saved(Image.fromarray(MASK * np.uint16(257)))), mask_is(MASK), ""),
    "mask: fractions, 0 and 1": (
        put("label", saved(Image.fromarray(MASK / np.float32(255)), ".tif")), mask_is(MASK), "",
    ),
    "mask: negative fractions": (
        put("label", saved(Image.fromarray(MASK / np.float32(-255)), ".tif")), LOAD, "x.tif: a mask holds no negative",
    ),
    "mask: BMP": (put("label", saved(Image.fromarray(MASK), ".bmp")), mask_is(MASK), ""),
    "image: BMP": (put("B", saved(RGB, ".bmp")), LOAD, ""),
    "mask: red on black": (put("label", saved(coloured(MASK, (255, 0, 0)))), mask_is(MASK), ""),
    "mask: dark green on black": (put("label", saved(coloured(MASK, (0, 200, 0)))), mask_is(MASK), ""),
    "mask: red on black, a JPEG": (
        put("label", saved(coloured(MASK, (255, 0, 0)), ".jpg", quality=95, subsampling=0)), mask_is(MASK), "",
    ),
    "mask: red and white on black": (
        put("label", saved(coloured(MASK, (255, 0, 0), (255, 255, 255)))), LOAD, "one colour on black, this one is",
    ),
    "mask: a palette of black and brown": (
        put("label", saved(paletted(MASK, (0, 0, 0), (90, 60, 20)))), mask_is(MASK), "",
    ),
    "mask: a palette, its black last": (
        put("label", saved(paletted(255 - MASK, (90, 60, 20), (0, 0, 0)))), mask_is(MASK), "",
    ),
    "mask: 0 and 254": (put("label", saved(Image.fromarray(MASK // 255 * 254))), mask_is(MASK), ""),
    "mask: 35 pixels of 254": (put("label", saved(Image.fromarray(speckled(MASK, 254)))), mask_is(MASK), ""),
    "mask: 1, 213 and 254 along edges": (
        put("label", saved(Image.fromarray(speckled(MASK, 254, 213, 1)))), mask_is(MASK), "",
    ),
    "mask: 0, 1 and 255": (
        put("label", saved(Image.fromarray(speckled(MASK, 255, 1)))), LOAD, "this one 0, 1, 255; give IGNORE=255",
    ),
    "mask: 0, 1, 2 and 255": (
        put("label", saved(Image.fromarray(speckled(MASK, 255, 1, 2)))), LOAD, "this one 0, 1, 2, 255; give IGNORE",
    ),
    "mask: 0 and 2": (put("label", saved(Image.fromarray(MASK // 255 * 2))), LOAD, "this one 0, 2; save it"),
    "mask: 0 to 3": (put("label", saved(Image.fromarray(speckled(MASK // 255, 2, 3)))), LOAD, "this one 0, 1, 2, 3"),
    "mask: smooth": (put("label", saved(Image.fromarray(np.linspace(0, 255, MASK.size).astype(np.uint8).reshape(
        MASK.shape)))), LOAD, "a mask holds 0 and 255"),
    "mask: of another size": (put("label", SMALL), LOAD, "label/x.png: 8 × 8 pixels, but"),
    "mask: missing": (lambda: Path("val/label/x.png").unlink(), LOAD, "A/x.png: no file of that name in val/label"),
    # Folders
    "folder: missing": (lambda: shutil.rmtree("val"), LOAD, "val/A: no such folder"),
    "folder: no label": (lambda: shutil.rmtree("val/label"), LOAD, "val/label: no such folder"),
    "folder: empty": (each("val/*/*", Path.unlink), LOAD, "val/A and val/B and val/label: no images"),
    "folder: a file": (lambda: (shutil.rmtree("val"), Path("val").touch()), LOAD, "val/A: no such folder"),
    "folder: unreadable": (lambda: os.chmod("val/B", 0), LOAD, "val/B"),
    "folder: lower case": (lambda: os.rename("val/A", "val/a"), LOAD, "val/A: no such folder"),
    "names: upper and lower case": (
        lambda: os.rename("val/B/x.png", "val/B/X.png"), LOAD, "B/X.png: no file of that name in val/A",
    ),
    "names: .PNG": (lambda: os.rename("val/B/x.png", "val/B/x.PNG"), LOAD, ""),
    "names: x.png and x.tif": (write("val/B/x.tif", saved(RGB, ".tif")[1]), LOAD, "B/x.*: a second file beside x"),
    "names: strays of other programs": (write("val/A/.DS_Store", b"x"), LOAD, ""),
    "cache: a file": (
        lambda: Path("cache").touch(), lambda: LEVIRCD(".", "val", cache_dir="cache"),
        "CACHE_DIR=cache: can't be filled",
    ),
    # Constants
    **{
        f"constant: {argument}": (nothing, run(**dict([argument.split("=")])), argument.split("=")[0])
        for argument in (
            "EPOCH=3", "EPOCHS=0", "EPOCHS=-1", "EPOCHS=2.5", "EPOCHS=many", "EPOCHS=True", "EPOCHS=None", "EPOCHS=",
            "LEARNING_RATE=nan", "LEARNING_RATE=-1.0", "LEARNING_RATE=1e999", "AMP=1", "AMP=maybe", "DATA_DIR=None",
            "HUE=0.6", "ALPHA=1.5", "CROP_SIZE=0", "NUM_WORKERS=-1", "DEVICE=tpu9", "DEVICE=meta", "RUN_NAME=../up",
            "WEIGHTS=V9", "EVALUATE=", "SPLIT=val", "SPLIT=a/b",
        )
    },
    "constant: RUN_NAME=old, which is there": (A_RUN, run(RUN_NAME="old"), "RUN_NAME=old: that folder .* is there"),
    "constant: no value": (nothing, lambda: main.from_command_line(["EPOCHS"]), "EPOCHS: give NAME=value"),
    "constant: DATA_DIR=nowhere": (nothing, run(DATA_DIR="nowhere"), "nowhere/train/A: no such folder"),
    # Checkpoints
    "checkpoint: missing": (nothing, EVALUATE, "best.pt: no such checkpoint"),
    "checkpoint: a folder": (lambda: os.mkdir("best.pt"), EVALUATE, "best.pt: no such checkpoint"),
    "checkpoint: no bytes": (write("best.pt"), EVALUATE, "best.pt: no checkpoint, or a damaged one"),
    "checkpoint: text": (write("best.pt", "epoch,train_loss"), EVALUATE, "best.pt: no checkpoint, or a damaged one"),
    "checkpoint: an image": (write("best.pt", saved(RGB)[1]), EVALUATE, "best.pt: no checkpoint, or a damaged one"),
    "checkpoint: cut short": (
        lambda: (flip_a_weight(), os.truncate("best.pt", 10**7)), EVALUATE, "best.pt: no checkpoint, or a damaged one",
    ),
    "checkpoint: one bit of a weight flipped": (flip_a_weight, EVALUATE, "best.pt: no checkpoint, or a damaged one"),
    "checkpoint: code in the pickle": (
        checkpoint(lambda content: content | {"more": Payload()}), EVALUATE, "best.pt: no checkpoint, or a damaged one",
    ),
    "checkpoint: of another model": (
        checkpoint(lambda content: content | {"model": {"weight": torch.zeros(1)}}), EVALUATE,
        "best.pt: of another model",
    ),
    "checkpoint: weights alone": (checkpoint(lambda content: content["model"]), EVALUATE, "best.pt: of another model"),
    "checkpoint: a tensor": (checkpoint(lambda _: torch.zeros(3)), EVALUATE, "best.pt: no checkpoint"),
    # Runs
    "RESUME: nowhere": (nothing, run(RESUME="nowhere"), "RESUME=nowhere: not the folder of a run"),
    "RESUME: another folder": (nothing, run(RESUME="val"), "RESUME=val: not the folder of a run"),
    "RESUME: a file": (nothing, run(RESUME="val/A/x.png"), "RESUME=val/A/x.png: not the folder of a run"),
    "RESUME: nothing": (nothing, run(RESUME=""), "RESUME"),
    "RESUME: a damaged record": (
        write("runs/old/constants.json", "{"), run(RESUME="runs/old"), "not the folder of a run",
    ),
    "RESUME: a record of something else": (
        write("runs/old/constants.json", "[]"), run(RESUME="runs/old"), "not the folder",
    ),
    "RESUME: a run that scored": (
        write("runs/old/constants.json", RECORD.replace("null", '"best.pt"', 1)), run(RESUME="runs/old"),
        "this run scored",
    ),
    "RESUME: another seed": (A_RUN, run(RESUME="runs/old", SEED=3), "SEED=3: the run began with 0"),
    "RESUME: fewer epochs": (A_RUN, run(RESUME="runs/old", EPOCHS=4), "EPOCHS=4: .* the run began with 5"),
    "RESUME and EVALUATE": (
        A_RUN, run(RESUME="runs/old", EVALUATE="best.pt"), "EVALUATE=best.pt: the run began with None",
    ),
    "EVALUATE: a run's folder": (A_RUN, run(EVALUATE="runs/old"), "runs/old/best.pt: no such checkpoint"),
    # Archives
    "archive: a path that climbs out": (nothing, unpack("../../evil.png"), ""),
    "archive: a path from the root": (nothing, unpack("/tmp/evil.png"), ""),
    "archive: no archive": (nothing, unpack(None, b"PK not quite"), "train.zip: "),
    "archive: cut short": (nothing, unpack(None, b"PK\3\4" + bytes(200)), "train.zip: "),
}  # fmt: skip


def fingerprints() -> dict[Path, str]:
    """Of every file that was given; links, folders that can't be entered and what a run makes are left out."""
    files = [path for root in ("val", "best.pt") for path in [Path(root), *Path(root).rglob("*")]]
    return {path: hashlib.md5(path.read_bytes()).hexdigest() for path in files if path.is_file() and os.access(path, 4)}


def outcome(title: str) -> str:
    """What became of a case in the working folder: "right", or the line that was said; AssertionError otherwise."""
    prepare, act, expected = CASES[title]
    write_pair(Path("val"), "x", *PAIR)
    prepare()
    before, root = fingerprints(), os.geteuid() == 0 and title == "folder: unreadable"
    if root:  # who may read everything
        os.chmod(".", 0o755)
        os.seteuid(65534)
    try:
        result = act()
    except ERRORS as error:
        result = str(error)
        assert "\n" not in result, f"more than a line: {result}"
        assert expected and re.search(expected, result), f"{expected!r} is not in {result!r}"
    else:
        assert not expected and result is True, f"expected {expected or 'the right result'!r}, not {result}"
        result = "right"
    finally:
        if root:
            os.seteuid(0)
    after = fingerprints()
    assert all(after.get(path) == before[path] for path in before if path.exists()), "an input file was changed"
    assert not Path("harm").exists() and not list(Path("runs").glob("20*")), "something was made that should not be"
    return result


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it sees in such files
@pytest.mark.parametrize("title", CASES)
def test_bad_input(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome(title)


# Random bytes flipped: a clear line, or what a reader could still make of it, but no other error and no hang.


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for place in rng.integers(len(changed), size=rng.integers(1, 9)):
        changed[place] ^= rng.integers(1, 256)
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".tif compressed"])
def test_flipped_images(suffix, tmp_path):
    suffix, *compressed = suffix.split()
    options = {"compression": "tiff_adobe_deflate"} if compressed else {}
    _, image = saved(RGB, suffix, **options)
    _, mask = saved(Image.fromarray(MASK), suffix, **options)
    rng, file, refused = np.random.default_rng(1), tmp_path / f"x{suffix}", 0
    for _ in range(200):
        for content, read in ((image, read_rgb), (mask, read_mask)):
            file.write_bytes(flipped(content, rng))
            try:
                array = read(file)
            except DataError as error:
                assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
                refused += 1
            else:
                array = array if read is read_rgb else array[0]
                assert array.dtype == np.uint8 and (read is read_rgb or set(np.unique(array)) <= {0, 1})
    assert refused > 50


def test_flipped_checkpoints(tmp_path):
    content = {"model": {"weight": torch.arange(300.0)}, "epoch": 3, "rows": [{"val_iou": 0.5}]}
    file = tmp_path / "last.pt"
    torch.save(content, file)
    held, rng, refused = file.read_bytes(), np.random.default_rng(2), 0
    for _ in range(400):
        file.write_bytes(flipped(held, rng))
        try:
            read = read_checkpoint(file)
        except ModelError as error:
            assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
            refused += 1
        else:  # the flipped bytes carry nothing
            assert torch.equal(read["model"].pop("weight"), content["model"]["weight"])
            assert read == {"model": {}, "epoch": 3, "rows": [{"val_iou": 0.5}]}
    assert refused > 200


def test_flipped_archives(tmp_path, monkeypatch):
    """As they would be if a checksum were wrong as well."""
    monkeypatch.chdir(tmp_path)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("A", "B", "label"):
            archive.writestr(f"{name}/evil.png", saved(RGB)[1])
    rng, refused = np.random.default_rng(3), 0
    for _ in range(200):
        try:
            assert unpack(None, flipped(content.getvalue(), rng))()
        except DownloadError as error:
            assert "train.zip: " in str(error) and "\n" not in str(error)
            refused += 1
        shutil.rmtree("fetched")
        shutil.rmtree("served")
    assert refused > 100


if __name__ == "__main__":
    tracebacks, home = 0, Path.cwd()
    for title in CASES:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            os.chmod(folder, 0o755)
            try:
                print(f"{title:44}  {outcome(title)}", flush=True)
            except Exception:
                tracebacks += 1
                print(f"{title:44}  FAILED\n{traceback.format_exc()}", flush=True)
            os.chdir(home)
    print(f"{len(CASES)} inputs, {tracebacks} tracebacks or wrong results")
    sys.exit(tracebacks > 0)
