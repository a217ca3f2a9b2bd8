"""LEVIRCD, its batches and color_jitter on files written for the purpose, and on real pairs where there are any."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_pair, write_pair
from PIL import Image
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchvision.transforms.v2 import functional

import dataset
from dataset import LEVIRCD, DataError, RandomBatches, atomic_write, color_jitter, make_loader

RNG = np.random.default_rng(0)


def located_pair(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A pair whose every pixel tells where it is and of which date; the label is the parity of both coordinates."""
    y, x = np.indices((height, width), dtype=np.uint8)
    return np.dstack([y, x, 0 * y]), np.dstack([y, x, 0 * y + 1]), ((y // 2 + x) % 2) * 255


@contextlib.contextmanager
def one_of_several_processes(rank: int, world: int) -> Iterator[None]:
    """This process is told that it has a rank among others, which don't exist."""
    distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    yield
    distributed.destroy_process_group()


# Reading


def test_pairs_by_stem_and_passes_over_strays(tmp_path):
    folder = tmp_path / "train"
    pairs = {stem: random_pair(RNG, 8, 10) for stem in ("b", "a.x", "ç ñ")}
    for stem, pair in pairs.items():
        write_pair(folder, stem, *pair)
    (folder / "A" / "b.png").rename(folder / "A" / "b.PNG")
    Image.open(folder / "B" / "b.png").save(folder / "B" / "b.TIF")
    (folder / "B" / "b.png").unlink()
    for stray in ("A/.DS_Store", "B/Thumbs.db", "label/._b.png", "A/notes.txt"):
        (folder / stray).write_bytes(b"stray")
    (folder / "A" / "folder.png").mkdir()
    (tmp_path / "val").mkdir()
    data = LEVIRCD(tmp_path, "train")
    for index, stem in enumerate(sorted(pairs)):
        image_a, image_b, label = data[index]
        assert data.name(index) == stem and image_a.dtype == image_b.dtype == label.dtype == torch.uint8
        assert np.array_equal(image_a.permute(1, 2, 0), pairs[stem][0])
        assert np.array_equal(image_b.permute(1, 2, 0), pairs[stem][1])
        assert np.array_equal(label[0], pairs[stem][2] // 255)


MASK = np.array([[0, 1], [1, 0], [1, 1]], np.uint8)


def palette_mask(colours: list[int]) -> Image.Image:
    image = Image.fromarray(MASK)
    image.putpalette(colours)
    return image


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(MASK * 255),
        Image.fromarray(MASK),
        Image.fromarray(MASK.astype(bool)),
        Image.fromarray(np.dstack([MASK * 255] * 3)),
        Image.fromarray(np.dstack([MASK] * 3)),
        Image.fromarray(np.dstack([MASK * 255] * 3 + [MASK * 0 + 255])),
        palette_mask([0, 0, 0, 255, 255, 255]),
        palette_mask([0, 0, 0, 128, 0, 0]),  # as annotation tools colour class 1
        Image.fromarray((1 - MASK) * 255).point(lambda value: 255 - value).convert("P"),
    ],
)
def test_masks_of_every_kind(tmp_path, image):
    write_pair(tmp_path / "val", "x", *[np.zeros((3, 2, 3), np.uint8)] * 2, MASK)
    image.save(tmp_path / "val" / "label" / "x.png")
    assert np.array_equal(LEVIRCD(tmp_path, "val")[0][2][0], MASK)


def test_masks_of_several_classes(tmp_path):
    classes, cache = np.array([[0, 1], [2, 3], [0, 3]], np.uint8), tmp_path / "cache"
    coloured = Image.fromarray(classes).convert("P")
    coloured.putpalette([0, 0, 0, 200, 9, 9, 9, 200, 9, 9, 9, 200])
    for stem, image in (("grey", Image.fromarray(classes)), ("palette", coloured), ("binary", Image.fromarray(MASK))):
        write_pair(tmp_path / "val", stem, *[np.zeros((3, 2, 3), np.uint8)] * 2, MASK)
        image.save(tmp_path / "val" / "label" / f"{stem}.png")
    for _ in range(2):
        binary, grey, palette = LEVIRCD(tmp_path, "val", cache_dir=cache, num_classes=3)
        assert np.array_equal(grey[2][0], classes) and np.array_equal(palette[2][0], classes)
        assert np.array_equal(binary[2][0], MASK)
    for num_classes in (1, 2):  # also beside a cache that holds them decoded for three
        with pytest.raises(DataError, match=rf"a mask holds .* where NUM_CLASSES={num_classes}, this one 0, 1"):
            LEVIRCD(tmp_path, "val", cache_dir=cache, num_classes=num_classes)
    Image.fromarray(MASK * 255).save(tmp_path / "val" / "label" / "binary.png")
    with pytest.raises(
        DataError, match=r"binary\.png: .* 0 to 3 where NUM_CLASSES=3, this one 0, 255; give IGNORE=255"
    ):
        LEVIRCD(tmp_path, "val", cache_dir=cache, num_classes=3)


def test_images_of_every_kind(tmp_path):
    rgb = Image.fromarray(RNG.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    write_pair(tmp_path / "val", "x", *[np.zeros((8, 8, 3), np.uint8)] * 2, np.zeros((8, 8), np.uint8))
    for image in (rgb, rgb.convert("P"), rgb.convert("RGBA")):
        image.save(tmp_path / "val" / "A" / "x.png")
        assert np.array_equal(LEVIRCD(tmp_path, "val")[0][0].permute(1, 2, 0), np.asarray(image.convert("RGB")))


def test_ignored_pixels(tmp_path):
    mask = np.array([[0, 1, 255], [255, 0, 1]], np.uint8)
    write_pair(tmp_path / "val", "x", *[np.zeros((2, 3, 3), np.uint8)] * 2, mask)
    for num_classes in (1, 2):
        with pytest.raises(DataError, match="0, 1, 255; give IGNORE=255"):
            LEVIRCD(tmp_path, "val", num_classes=num_classes)
        assert np.array_equal(LEVIRCD(tmp_path, "val", num_classes=num_classes, ignore=255)[0][2][0], mask)
    mask = np.array([[0, 255, 7], [7, 0, 255]], np.uint8)
    write_pair(tmp_path / "val", "x", *[np.zeros((2, 3, 3), np.uint8)] * 2, mask)
    cached = LEVIRCD(tmp_path, "val", ignore=7, cache_dir=tmp_path / "cache")[0][2][0]
    assert np.array_equal(cached, [[0, 1, 255], [255, 0, 1]])


def test_void_pixels_are_ignored(tmp_path):
    image_a, image_b, mask = random_pair(RNG, 20, 30)
    write_pair(tmp_path / "val", "x", image_a, image_b, mask)
    see_through = np.dstack([image_b, np.full((20, 30), 255, np.uint8)])
    see_through[:5, :, 3] = 0
    Image.fromarray(see_through).save(tmp_path / "val" / "B" / "x.png")
    label = LEVIRCD(tmp_path, "val")[0][2][0].numpy()
    assert (label[:5] == 255).all() and np.array_equal(label[5:], mask[5:] // 255)


def test_composed_and_decomposed_names_are_one(tmp_path):
    write_pair(tmp_path / "val", "caf\u00e9", *random_pair(RNG, 8, 8))
    (tmp_path / "val" / "B" / "caf\u00e9.png").rename(tmp_path / "val" / "B" / "cafe\u0301.png")
    assert len(LEVIRCD(tmp_path, "val")) == 1


# Splits


def test_other_folder_names_and_subfolders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pairs = {stem: random_pair(RNG, 8, 10) for stem in ("city1/x", "city2/x", "y")}
    for stem, pair in pairs.items():
        for name, array in zip(("time1", "time2", "mask"), pair, strict=True):
            file = tmp_path / "val" / name / f"{stem}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(file)
    data = LEVIRCD("~", "val", folders=("time1", "time2", "mask"))
    assert len(data) == 3
    for index, stem in enumerate(pairs):
        assert np.array_equal(data[index][1].permute(1, 2, 0), pairs[stem][1])
        assert data.files[index][2] == tmp_path / "val" / "mask" / f"{stem}.png" and data.sizes[index] == (8, 10)
    with pytest.raises(DataError, match=r"val/A: no such folder; .*FOLDERS"):
        LEVIRCD(tmp_path, "val")


def test_a_tenth_of_train_is_val_where_there_is_none(tmp_path, capsys):
    for index in range(25):
        write_pair(tmp_path / "train", f"{index:02}", *random_pair(RNG, 8, 8))
    train, val, again = ({files[0] for files in LEVIRCD(tmp_path, split).files} for split in ("train", "val", "val"))
    assert len(val) == 3 and val == again and not train & val and len(train | val) == 25
    assert capsys.readouterr().out.count("3 of 25 pairs of train, by their names, are val instead") == 1
    (tmp_path / "val").mkdir()
    assert len(LEVIRCD(tmp_path, "train")) == 25


def test_fingerprint_follows_names_and_sizes(tmp_path):
    fingerprints = []
    for stem, padding in (("x", b""), ("x", b"\0"), ("y", b"")):
        write_pair(tmp_path / "val", stem, *[np.zeros((8, 8, 3), np.uint8)] * 2, np.zeros((8, 8), np.uint8))
        with open(tmp_path / "val" / "A" / f"{stem}.png", "ab") as file:
            file.write(padding)
        fingerprints += {LEVIRCD(tmp_path, "val").fingerprint() for _ in range(2)}
    assert len(fingerprints) == len(set(fingerprints)) == 3


def test_whether_any_pixel_changed(tmp_path):
    write_pair(tmp_path / "val", "x", *random_pair(RNG, 8, 8)[:2], np.full((8, 8), 255, np.uint8))
    assert not LEVIRCD(tmp_path, "val", ignore=255).has_change and LEVIRCD(tmp_path, "val").has_change


def test_images_that_give_no_batch_of_crops(tmp_path):
    (tmp_path / "val").mkdir()
    for stem, width in (("x", 64), ("y", 40)):
        write_pair(tmp_path / "train", stem, *random_pair(RNG, 32, width))
    with pytest.raises(DataError, match=r"x\.png: 64 × 32 pixels, less than CROP_SIZE=48: lower it"):
        LEVIRCD(tmp_path, "train", crop_size=48, augment=True)
    with pytest.raises(DataError, match=r"y\.png: 40 × 32 pixels, but .*x\.png has 64 × 32: .*; set CROP_SIZE"):
        LEVIRCD(tmp_path, "train", augment=True)
    assert len(LEVIRCD(tmp_path, "train")) == 2


# Tiles and crops


@pytest.mark.parametrize(("size", "tiles"), [((64, 64), 16), ((50, 37), 12), ((16, 16), 1), ((7, 9), 1)])
def test_tiles_hold_each_pixel_once(tmp_path, size, tiles):
    write_pair(tmp_path / "val", "x", *located_pair(*size))
    data = LEVIRCD(tmp_path, "val", crop_size=16)
    pixels = torch.cat([data[index][0].flatten(1) for index in range(len(data))], 1)
    assert len(data) == tiles
    assert pixels.shape[1] == size[0] * size[1] == len(set(map(tuple, pixels.T.tolist())))


def test_crops_stay_together_and_take_every_turn(tmp_path):
    write_pair(tmp_path / "train", "x", *located_pair(40, 50))
    data = LEVIRCD(tmp_path, "train", crop_size=16, augment=True, swap_dates=0.5, cache_dir=tmp_path / "cache")
    assert len(data) == 2 * 3  # as many as fit side by side
    turns, swaps, corners = set(), 0, set()
    for draw in range(400):
        image_a, image_b, label = data[draw % len(data)]
        y, x = image_a[0].int(), image_a[1].int()
        assert torch.equal(image_a[:2], image_b[:2])
        assert torch.equal(label[0].int(), (y // 2 + x) % 2)
        assert image_a[2, 0, 0] + image_b[2, 0, 0] == 1
        swaps += int(image_a[2, 0, 0])
        turns.add(tuple((int(y[i, j] - y[8, 8]), int(x[i, j] - x[8, 8])) for i, j in ((7, 8), (8, 7))))
        corners.add((int(y.min()), int(x.min())))
        assert len(set(zip(y.flatten().tolist(), x.flatten().tolist(), strict=True))) == 256
    assert len(turns) == 8 and 150 < swaps < 250
    assert {y for y, _ in corners} == set(range(25)) and {x for _, x in corners} == set(range(35))


def test_an_epoch_holds_borders_and_corners_too(tmp_path):
    """A crop's middle is in one of 64 rows: 16 of them hold an inner pixel, 9 a border pixel; there are four crops."""
    write_pair(tmp_path / "train", "x", *located_pair(64, 64))
    data = LEVIRCD(tmp_path, "train", crop_size=16, augment=True, cache_dir=tmp_path / "cache")
    assert len(data) == 16
    held = np.zeros((64, 64))
    for seed in range(200):
        for index in range(len(data)):
            y, x, _ = data[index, 1000 * seed + index][0].numpy().astype(int)
            assert abs(y - index // 4 * 16 - 8).min() <= 8 and abs(x - index % 4 * 16 - 8).min() <= 8
            held[y, x] += 1 / 200
    assert held[16:48, 16:48].mean() == pytest.approx(1, abs=0.05)
    assert held[[0, -1], 16:48].mean() == pytest.approx(9 / 16, abs=0.05)
    assert held[[0, 0, -1, -1], [0, -1, 0, -1]].mean() == pytest.approx((9 / 16) ** 2, abs=0.05)


def test_crops_of_one_pixel(tmp_path):
    write_pair(tmp_path / "train", "x", *located_pair(4, 4))
    data = LEVIRCD(tmp_path, "train", crop_size=1, augment=True)
    assert {data[0, seed][0].shape for seed in range(20)} == {(3, 1, 1)}


def test_whole_oblong_images_keep_their_shape(tmp_path):
    write_pair(tmp_path / "train", "x", *located_pair(8, 12))
    crops = [LEVIRCD(tmp_path, "train", augment=True)[0, seed][0] for seed in range(40)]
    assert {crop.shape for crop in crops} == {(3, 8, 12)}
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) == 4  # two turns, mirrored or not


# Batches


def test_evaluation_batches_hold_one_size_and_every_item(tmp_path):
    write_pair(tmp_path / "val", "x", *random_pair(RNG, 40, 50))
    data = LEVIRCD(tmp_path, "val", crop_size=16)
    batches = data.batches(2 * 16 * 16)
    labels = [torch.stack([data[index][2] for index in batch]) for batch in batches]  # not of two sizes
    assert sorted(index for batch in batches for index in batch) == list(range(len(data)))
    assert max(label.numel() for label in labels) == 2 * 16 * 16
    assert [len(batch) for batch in data.batches(1)] == [1] * len(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_and_their_order_follow_from_the_seed_alone(tmp_path, workers):
    write_pair(tmp_path / "train", "x", *random_pair(RNG, 64, 64))
    data = LEVIRCD(tmp_path, "train", crop_size=16, augment=True)
    loader = make_loader(data, RandomBatches(len(data), 3), workers, on_gpu=False)
    torch.manual_seed(7)
    epochs = [[torch.cat(batch, 1) for batch in loader] for _ in range(2)]
    torch.manual_seed(7)
    batches = list(RandomBatches(len(data), 3))
    assert len(loader) == len(batches) == 5 and len({index for batch in batches for index, _ in batch}) == 15
    for batch, draws in zip(epochs[0], batches, strict=True):
        assert torch.equal(batch, torch.stack([torch.cat(data[draw]) for draw in draws]))
    assert not torch.equal(epochs[0][0], epochs[1][0])


def test_processes_share_every_batch_and_its_colours():
    images = torch.randint(0, 256, (8, 3, 6, 6), dtype=torch.uint8)

    def drawn(rank: int, world: int) -> tuple[list, torch.Tensor]:
        torch.manual_seed(3)
        return list(RandomBatches(20, 8)), color_jitter(images[rank::world], 0.3, 0.3, 0.3)

    batches, colours = drawn(0, 1)
    assert [len(batch) for batch in batches] == [8, 8]
    for rank in range(4):
        with one_of_several_processes(rank, 4):
            share, its_colours = drawn(rank, 4)
            with pytest.raises(DataError, match="7 crops don't fill a batch of 8 to share: lower BATCH_SIZE"):
                RandomBatches(7, 8)
        assert share == [batch[rank::4] for batch in batches]
        torch.testing.assert_close(its_colours, colours[rank::4], atol=1e-6, rtol=0)
    assert [len(batch) for batch in RandomBatches(7, 8)] == [7]


def test_as_many_workers_as_usable_cores(tmp_path, monkeypatch):
    write_pair(tmp_path / "val", "x", *random_pair(RNG, 8, 8))
    data = LEVIRCD(tmp_path, "val")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5}, raising=False)
    assert [make_loader(data, data.batches(1), None, on_gpu).num_workers for on_gpu in (True, False)] == [3, 0]


# The cache


def test_the_cache_gives_the_same_and_follows_the_files(tmp_path):
    for stem in "xy":
        write_pair(tmp_path / "val", stem, *random_pair(RNG, 32, 32), suffix=".bmp")
    cache, file = tmp_path / "cache", tmp_path / "val" / "B" / "x.bmp"

    def decoded_at() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in cache.iterdir()}

    plain, cached = LEVIRCD(tmp_path, "val", 16), LEVIRCD(tmp_path, "val", 16, cache_dir=cache)
    assert all(map(torch.equal, sum(zip(*plain, strict=True), ()), sum(zip(*cached, strict=True), ())))
    before = decoded_at()
    LEVIRCD(tmp_path, "val", cache_dir=cache)
    assert decoded_at() == before and [np.load(path).shape for path in before] == [(32, 32, 7)] * 2
    # An archive may give a corrected file the old size and time.
    stat, corrected = file.stat(), random_pair(RNG, 32, 32)
    write_pair(tmp_path / "val", "x", *corrected, suffix=".bmp")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert np.array_equal(LEVIRCD(tmp_path, "val", cache_dir=cache)[0][1].permute(1, 2, 0), corrected[1])
    assert len(decoded_at()) == 3 and before.items() < decoded_at().items()  # y was not decoded again
    file.with_name("x.bmp.aux.xml").write_text("<PAMDataset/>")  # where GDAL may note values without data
    LEVIRCD(tmp_path, "val", cache_dir=cache)
    assert len(decoded_at()) == 4


def test_a_damaged_cache_is_mended(tmp_path):
    write_pair(tmp_path / "val", "x", *random_pair(RNG, 32, 32))
    data = LEVIRCD(tmp_path, "val", cache_dir=tmp_path / "cache")
    (file,), expected = (tmp_path / "cache").iterdir(), data[0]
    whole = file.read_bytes()
    for damaged in (b"", b"not an array", whole[:-1], None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert all(map(torch.equal, data[0], expected)) and file.read_bytes() == whole


def test_a_cache_that_cannot_be_written(tmp_path):
    write_pair(tmp_path / "val", "x", *random_pair(RNG, 32, 32))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"CACHE_DIR: .*file/cache.*; CACHE_DIR=None works without it"):
        LEVIRCD(tmp_path, "val", cache_dir=tmp_path / "file" / "cache")


# Colour jitter


@pytest.mark.parametrize("strengths", [(0.6, 0, 0), (0, 0.6, 0), (0, 0, 0.6), (0.2, 0.3, 0.4)])
def test_jitter_agrees_with_torchvision(strengths):
    """Also one after the other, on colours that stay within 0..1 so that it doesn't matter where they are clipped."""
    low, high = (80, 160) if all(strengths) else (0, 256)
    image = torch.randint(low, high, (1, 3, 24, 32), dtype=torch.uint8)
    for seed in range(8):
        torch.manual_seed(seed)
        ours = color_jitter(image, *strengths)
        torch.manual_seed(seed)
        expected = image / 255
        adjustments = functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation
        for adjust, strength in zip(adjustments, strengths, strict=True):
            factor = torch.empty(1).uniform_(1 - strength, 1 + strength).item()
            if strength:
                expected = adjust(expected, factor)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_jitter_is_drawn_for_each_image():
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8).expand(6, 3, 8, 8)
    jittered = color_jitter(images, 0.3, 0.3, 0.3)
    assert jittered.min() >= 0 and jittered.max() <= 1 and len(jittered.flatten(1).unique(dim=0)) == 6
    torch.testing.assert_close(color_jitter(images, 0, 0, 0), images / 255, atol=1e-6, rtol=0)


# Lines and files


def test_odd_masks_are_announced_once_a_split(tmp_path, capsys):
    mask = np.repeat(np.array([0, 254], np.uint8), 800).reshape(40, 40)
    for stem, its_mask in (("a", mask // 254 * 255), ("b", mask), ("c", mask)):
        write_pair(tmp_path / "val", stem, *random_pair(RNG, 40, 40)[:2], its_mask)
    for cache in (None, tmp_path / "cache"):
        dataset._printed.clear()
        for _ in range(2):
            data = LEVIRCD(tmp_path, "val", cache_dir=cache)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("val: 2 of 3 masks hold other values than 0 and 255: above 127 is change")
        assert line.endswith(f"(such as {tmp_path}/val/label/b.png)")
        assert all(np.array_equal(label[0], mask > 0) for *_, label in data)


def test_only_the_first_process_prints(capsys):
    for rank, line in ((1, ""), (0, "said\n")):
        with one_of_several_processes(rank, 2):
            dataset.announce("said")
        assert capsys.readouterr().out == line


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(file) as part:
        part.write("new")
        part.write(str(1 / 0))
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["x"]
    with atomic_write(file) as part:
        part.write("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["x"]


def test_real_pairs(real):
    data = LEVIRCD(real, "val")
    assert [tuple(item[0].shape) for item in data] == [(3, 1024, 1024)] * 2
    changed = {data.name(index): data[index][2].float().mean().item() for index in range(len(data))}
    assert changed == pytest.approx({"val_1": 0.007, "test_13": 0.098}, abs=1e-3)
    assert len(LEVIRCD(real, "train", crop_size=256, augment=True)) == 112
